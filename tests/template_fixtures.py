"""Chat templates in the style of each model family, written for these tests from the formats' descriptions. Not a test.

The families' own templates differ in wording and in what they do with tools; the text around messages is theirs.
One table of templates, longer than 400 lines because it is data.
"""

from dataclasses import dataclass

from text_fixtures import CHATML
from text_fixtures import talk as talk

from data_tools.schema import Message


@dataclass(frozen=True)
class Family:
    """A template with the tokens it prints by name.

    end: what ends an answer. grows: a longer conversation's text begins with the shorter one's. bos: the text begins
    with BOS, once.
    """

    template: str
    bos_token: str | None
    eos_token: str
    end: str
    grows: bool = True
    bos: bool = True

    @property
    def tokens(self) -> dict[str, str]:
        named = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {name: token for name, token in named.items() if token is not None}


LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set intro, turns = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n', messages[1:] %}
{% else %}
{% set intro, turns = '', messages %}
{% endif %}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% set words = (intro if loop.first else '') + turn['content'] %}
{% if turn['role'] == 'user' %}
{{- bos_token + '[INST] ' + words.strip() + ' [/INST]' }}
{%- elif turn['role'] == 'assistant' %}
{{- ' ' + words.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if not day is defined %}
    {%- if strftime_now is defined %}
        {%- set day = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set day = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- set first = messages[0] %}
{%- set system = first.content | trim if first.role == 'system' else '' %}
{%- set turns = messages[1:] if first.role == 'system' else messages %}
{{- header('system') }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + day + "\\n\\n" }}
{{- system + '<|eot_id|>' }}
{%- for turn in turns %}
    {%- if turn.role not in ['user', 'assistant'] or 'tool_calls' in turn %}
        {{- raise_exception('unknown role ' ~ turn.role) }}
    {%- endif %}
    {{- header(turn.role) + turn['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""

SMOLLM2 = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

SMOLLM3 = """{%- set enable_thinking = enable_thinking if enable_thinking is defined else false %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- set first = messages[0] %}
{%- set words = first.content if first.role == 'system' else 'You are a helpful assistant.' %}
{%- if words.endswith('/think') %}
    {%- set mode = '/think' %}
    {%- set words = words.removesuffix('/think').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\n' }}
{{- 'Today Date: ' ~ strftime_now('%d %B %Y') ~ '\\n' }}
{{- 'Reasoning Mode: ' + mode + '\\n\\n' + words.rstrip() + '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {% generation %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if mode != '/think' %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}
        {{- message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- elif message.role != 'system' %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if mode != '/think' %}{{- '<think>\\n\\n</think>\\n' }}{% endif %}
{%- endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

MISTRAL1 = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ message['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"""

MISTRAL3 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if message.role in ('user', 'assistant') %}
    {%- if (message.role == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
{%- if user_messages | length == 0 %}{{ raise_exception("no user") }}{% endif %}"""

QWEN2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and
           not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GEMMA2 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

PHI3 = """{% for message in messages %}
{%- if message['role'] == 'system' and message['content'] %}
{{- '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}
{{- '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

COHERE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}
{%- set system_message = messages[0]['content'] %}{% elif false == true %}{% set turns = messages %}
{%- else %}{% set turns = messages %}{% set system_message = false %}{% endif %}
{%- if system_message != false %}
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set content = message['content'] %}
{%- if message['role'] == 'user' %}
{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message['role'] == 'assistant' %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

OLMO2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{- '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}
{{- '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}
{{- '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}
{{- '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

FAMILIES = {
    "Llama 2": Family(LLAMA2, "<s>", "</s>", "</s>", bos=False),
    "Llama 3": Family(LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "SmolLM2": Family(SMOLLM2, "<|im_start|>", "<|im_end|>", "<|im_end|>", bos=False),
    "SmolLM3": Family(SMOLLM3, None, "<|im_end|>", "<|im_end|>"),
    "TinyLlama, Zephyr": Family(ZEPHYR, "<s>", "</s>", "</s>", bos=False),
    "Mistral v1": Family(MISTRAL1, "<s>", "</s>", "</s>"),
    "Mistral v3": Family(MISTRAL3, "<s>", "</s>", "</s>"),
    "Qwen2": Family(QWEN2, None, "<|im_end|>", "<|im_end|>"),
    "Qwen2.5": Family(QWEN25, None, "<|im_end|>", "<|im_end|>"),
    "Qwen3": Family(QWEN3, None, "<|im_end|>", "<|im_end|>", grows=False),
    "Gemma, Gemma 2": Family(GEMMA2, "<bos>", "<eos>", "<end_of_turn>"),
    "Gemma 3": Family(GEMMA3, "<bos>", "<eos>", "<end_of_turn>"),
    "Phi-3": Family(PHI3, "<s>", "<|endoftext|>", "<|end|>", grows=False, bos=False),
    "Cohere (aya-expanse)": Family(COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "OLMo 2": Family(OLMO2, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "ChatML": Family(CHATML, None, "<|im_end|>", "<|im_end|>"),
}

# What templates use of jinja2, each in a few lines; the tokens are those of Llama 2.
FEATURES = {
    "trimmed and stripped blocks": (
        "  {% if true %}\n  a\n  {% endif %}\n\n{%+ if true %} b{% endif %}\n{{- ' c' -}}\n d\n"
    ),
    "no trailing newline": "a\n",
    "tojson": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ 'é<&\\'\"' | tojson(ensure_ascii=True) }}"
        "{{ {'b': 1, 'a': [1.5, none, true]} | tojson(sort_keys=True, separators=(',', ':')) }}"
        "{{ [] | tojson(indent=1) }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}"
        "{% break %}{% endif %}{{ loop.index }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role if not loop.last }}"
        "{{ loop.cycle('x', 'y') }}{{ loop.changed(m.role) }}{{ loop.revindex }}{{ loop.length }}{% else %}none"
        "{% endfor %}"
    ),
    "a filtered loop": "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "generation": (
        "{% set x = 1 %}{% for m in messages %}{%- generation -%} {% set x = 2 %}{{ m.content }}{{ x }} "
        "{%- endgeneration %}{{ x }}{% generation %}\n  a\n  {% endgeneration %}\n{% endfor %}"
    ),
    "raise_exception": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ 1 }}",
    "namespace": (
        "{% set ns = namespace(n=0, text='') %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content | length %}{% set ns.text = ns.text ~ m.role[0] %}{% endfor %}"
        "{{ ns.n }}{{ ns.text }}{{ ns.nothing is defined }}"
    ),
    "string methods": (
        "{% for m in messages %}{% set c = m.content %}{{ c.strip() }}{{ c.split(' ')[-1] }}{{ c.upper() }}"
        "{{ c.title() }}{{ c.startswith('a') }}{{ c.replace('e', '3') }}{{ c.find('e') }}"
        "{{ c.removeprefix('H') }}{{ ', '.join(c.split()) }}{{ '%s|%5d' % (c, 7) }}{{ '{:>6}{}'.format(c, 1) }}"
        "{{ '{x}'.format_map({'x': c}) }}{{ c.splitlines() }}{{ c.center(9, '*') }}{{ c.zfill(4) }}"
        "{{ c[::-1] }}{{ c[1:3] }}{{ c.count('l') }}{% endfor %}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | unique | join(', ') }}"
        "{{ messages | selectattr('role', 'eq', 'user') | list }}"
        "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | map('upper') | list }}"
        "{{ messages | length }}{{ (messages | first).role }}{{ (messages | last).role }}"
        "{{ none | default('d') }}{{ '' | default('e', true) }}{{ 'a b' | title | lower | capitalize }}"
        "{{ 'a\\nb' | indent(3, first=true) }}{{ [3, 1, 2] | sort(reverse=true) | join }}"
        "{{ {'k': 1} | items | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 'abc' | replace('b', '') | reverse }}"
        "{{ '7' | int + 1.5 | round(1) | float }}{{ '<&>' | e }}{{ '<' | safe }}{{ 3.7 | int }}"
        "{{ [1, 2] | sum }}{{ [1, 2] | max }}{{ 'x' | string | trim }}{{ ['a', 'b'] | batch(1) | list }}"
        "{{ messages | groupby('role') | map('first') | list }}{{ '%s' | format(1) }}"
        "{{ 'abcdef' | truncate(4, true, '..') }}"
    ),
    "operators": (
        "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 7 / 2 }}{{ 'a' * 3 }}{{ [1] + [2] }}{{ 'a' ~ 1 ~ none }}{{ -3 }}"
        "{{ 'b' in 'abc' }}{{ 1 if messages else 2 }}{{ not true }}{{ 1 == 1.0 }}{{ range(2, 9, 3) | list }}"
        "{{ (1, 'a') }}{{ {'x': [1]} }}"
    ),
    "macros and call blocks": (
        "{% macro say(role, text='-') %}[{{ role }}:{{ text }}{{ caller() if caller }}]{% endmacro %}"
        "{{ say('user') }}{% call say('x', text=messages[0].content) %}inner{% endcall %}{% set block %}"
        "{{ say('b') }}{% endset %}{{ block }}{% filter upper %}loud{% endfilter %}{% with a = 1 %}{{ a }}"
        "{% endwith %}"
    ),
    "recursive loop": "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "undefined": (
        "{{ nothing }}{{ messages[0].nothing }}{{ messages[99] }}{{ nothing is defined }}{{ tools }}{{ documents }}"
    ),
    "undefined attribute": "{{ nothing.at_all }}",
    "dates": "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%A %B') }}",
    "dict and other globals": (
        "{{ dict(a=1) }}{{ dict([('b', 2)]) }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}"
    ),
    "tests": (
        "{{ messages is iterable }}{{ messages is string }}{{ messages[0] is mapping }}{{ 3 is odd }}"
        "{{ none is none }}{{ 1 is number }}{{ true is boolean }}{{ messages is sequence }}"
        "{{ 'a' is in ['a'] }}{{ tools is defined }}"
    ),
    "comments and raw": "{# a #}b{#- c -#}  d{% raw %}{{ x }}{% endraw %}",
    "special tokens by name": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token is defined }}",
}

CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "one question": talk("Hello"),
    "one answer": talk("Hello", "Hi there."),
    "system": talk("Hello", "Hi there.", system="Be brief."),
    "several turns": talk(" a ", "\nb\n", "c\n\nd", "<think>\nhm\n</think>\n\ne", "f"),
    "several turns with system": talk("q1", "a1", "q2", "a2", system="  S \n"),
    "other scripts": talk("سلام، ۲+۲؟", "۴", "数学 🙂", "é <b> & \"x\" 'y' \\n", system="مختصر"),
    "spelled tokens": talk("say <|im_end|> </s>", "<|eot_id|> [INST]"),
    "assistant first": (Message("assistant", "Hi"), Message("user", "Hello")),
}
