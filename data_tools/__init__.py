"""From JSON Lines to token ids: everything that happens to text before a model sees it.

Read and check rows (`jsonl`, `schema`), turn them into text (`chat_template`, `render`) and tokens (`tokenizer`,
`encode`), look at the result (`show`), keep it on disk and order it (`shards`, `grouping`), and find what a model could
learn instead of the content (`lint`). Nothing here imports torch or the trainer, so that data can be prepared on any
machine.
"""
