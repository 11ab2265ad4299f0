"""The models that the trainer can train, and the ways their weights come in and go out.

What a model computes is here; how it is trained, sharded or scored is not.
"""
