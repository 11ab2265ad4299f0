"""Hostile chat templates: each ends with one TemplateError, in bounded time and memory; ordinary ones do not notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from text_fixtures import CHATML, talk

from data_tools.chat_template import ChatTemplate
from data_tools.errors import TemplateError
from data_tools.template_sandbox import MAX_BITS, MAX_SOURCE

ROOT = Path(__file__).parent.parent
NEST = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
GROW = (
    "{{% set ns = namespace(x='ab') %}}{{% for i in range(60) %}}{{% set ns.x = {grown} %}}{{% endfor %}}{{{{ ns.x }}}}"
)
BIG = "{% set big = 'a' * 100000 %}"
LISTS = "{% set a = [('a' * 9000) ~ 'b'] * 9 %}{% set b = [('a' * 9000) ~ 'b'] * 9 %}"
DEEP = (
    "{% set ns = namespace(x=()) %}{% for i in range(9999) %}"
    "{% set ns.x = ((((((((((ns.x,),),),),),),),),),) %}{% endfor %}"
)
# name: (template, words of the error)
ATTACKS = {
    # loops
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "nested loops": (NEST, "steps"),
    "nested loops that print": (NEST.replace("{% endfor %}", "x{% endfor %}", 1), "steps"),
    "a recursive loop": (
        "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}", "recursion|steps|much more"
    ),
    "a loop in a macro": (
        "{% macro m(n) %}{% for i in range(99) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(9) }}",
        "steps|much more",
    ),
    "a filtered loop": (NEST[:27] + "{% for j in range(99999) if j > 0 %}{% endfor %}{% endfor %}", "steps"),
    "long text in a loop": ("{% for i in range(99999) %}" + "long text " * 5000 + "{% endfor %}", "much more text"),
    "a big block in a loop": (
        BIG + "{% macro m() %}{% for i in range(99999) %}{{ big }}{% endfor %}{% endmacro %}{{ m() }}", "much more"
    ),
    "generators in a row": (
        BIG + "{{ range(99999) | map('string') | map('list') | map('join', big) | list }}", "more text|steps"
    ),
    # recursion
    "an endless macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "two endless macros": (
        "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion|undefined"
    ),
    "an endless call block": (
        "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}", "recursion"
    ),
    # strings that grow
    "a repeated string": ("{{ 'a' * 10**10 }}", "much more text"),
    "a repeated string, turned": ("{{ 10**10 * 'a' }}", "much more text"),
    "a repeated list": ("{{ ([1] * 10**9) | length }}", "much more text"),
    "doubling by +": (GROW.format(grown="ns.x + ns.x"), "much more text"),
    "doubling by ~": (GROW.format(grown="ns.x ~ ns.x"), "much more text"),
    "doubling by *": (GROW.format(grown="ns.x * 2"), "much more text"),
    "doubling by %": (GROW.format(grown="'%s%s' % (ns.x, ns.x)"), "much more text"),
    "doubling by format": (GROW.format(grown="'{0}{0}'.format(ns.x)"), "much more text"),
    "doubling by format_map": (GROW.format(grown="'{a}{a}'.format_map({'a': ns.x})"), "much more text"),
    "doubling by the filter format": (GROW.format(grown="'%s%s' | format(ns.x, ns.x)"), "much more text"),
    "doubling by join": (GROW.format(grown="[ns.x, ns.x] | join"), "much more text"),
    "doubling by str.join": (GROW.format(grown="''.join([ns.x, ns.x])"), "much more text"),
    "doubling by replace": (GROW.format(grown="ns.x | replace('a', 'aa') | replace('b', 'bb')"), "much more text"),
    "doubling by str.replace": (GROW.format(grown="ns.x.replace('', ns.x)"), "much more text"),
    "doubling by a block": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}", "much more text"
    ),
    "doubling a list": (GROW.format(grown="ns.x | list + ns.x | list"), "much more text"),
    "a list of lists of lists": (GROW.format(grown="[ns.x, ns.x]"), "much more text|recursion"),
    "large strings kept": (BIG + GROW.format(grown="[ns.x, big ~ i]"), "much more text|recursion"),
    "joined references": (BIG + "{{ ([big] * 99999) | join }}", "much more text"),
    "joined by a long string": (BIG + "{{ range(99999) | join(big) }}", "much more text"),
    "printed references": (BIG + "{{ [big] * 99999 }}", "much more text"),
    "references as JSON": (BIG + "{{ ([big] * 99999) | tojson }}", "much more text"),
    "JSON far to the right": ("{{ [[[[1] * 99] * 99] * 9] | tojson(indent=900) }}", "much more text"),
    "JSON with long commas": (BIG + "{{ ([1] * 9999) | tojson(separators=(big, big)) }}", "much more text"),
    "references as an attribute": (BIG + "{{ ([namespace(x=big)] * 99999) | join(attribute='x') }}", "much more text"),
    "references in capitals": (BIG + "{{ ([big] * 99999) | upper }}", "much more text"),
    "references in a test": (BIG + "{{ ([big] * 99999) is lower }}", "much more text"),
    "references in an error": (BIG + "{{ [1][(big,) * 99999].x }}", "much more text"),
    "references in another error": (BIG + "{{ raise_exception([big] * 99999) }}", "much more text"),
    "references as a name": (BIG + "{{ '' | attr([big] * 99999) }}", "much more text"),
    "references as a filter": (BIG + "{{ [1] | map((big,) * 99999) | list }}", "much more text"),
    # comparing
    "long lists compared": (LISTS + "{{ a == b }}" * 50, "much more text"),
    "a long list searched": (LISTS + "{{ 'a' in a }}{{ b[0] in a }}" * 50, "much more text"),
    "a long list searched by a method": (LISTS + "{{ a.count(b[0]) }}" * 50, "much more text"),
    "a long list searched by a test": (LISTS + "{{ a is eq(b) }}" * 50, "much more text"),
    "a long list sorted": (LISTS + "{{ (a + b) | sort | length }}" * 50, "much more text"),
    "a long list without doubles": (LISTS + "{{ a | unique | list | length }}" * 50, "much more text"),
    "a loop that asks for changes": (LISTS + "{% for i in range(99) %}{{ loop.changed(a) }}{% endfor %}", "much more"),
    # what ends the process: Python hashes a deep tuple without a guard
    "a deep key": (DEEP + "{{ {}[ns.x] }}", "deeper"),
    "a deep key of a new dictionary": (DEEP + "{{ {ns.x: 1} }}", "deeper"),
    "a deep key in pairs": (DEEP + "{{ dict([(ns.x, 1)]) }}", "deeper"),
    "a deep key of a method": (DEEP + "{{ {}.get(ns.x) }}", "deeper"),
    "a deep member": (DEEP + "{{ ns.x in {} }}", "deeper"),
    "a deep value among others": (DEEP + "{{ [ns.x, ns.x] | unique | list }}", "deeper"),
    "a deep group": (DEEP + "{{ [{'k': ns.x}] | groupby('k') }}", "deeper"),
    "a deep value printed": (DEEP + "{{ ns.x }}", "deeper"),
    "a deep value as JSON": (DEEP + "{{ ns.x | tojson }}", "recursion|deeper"),
    "a deep filter": (DEEP + "{{ [1] | map(ns.x) | list }}", "deeper"),
    "a deep test": (DEEP + "{{ [1] | select(ns.x) | list }}", "deeper"),
    # widths
    "a wide percent": ("{{ '%09999999999d' % 1 }}", "width"),
    "a wide star": ("{{ '%*d' % (10**9, 1) }}", "width"),
    "a wide format": ("{{ '{:>99999999999}'.format(1) }}", "width"),
    "a nested width": ("{{ '{:>{w}}'.format(1, w=10**10) }}", "width"),
    "a wide centre": ("{{ 'a' | center(10**10) }}", "width"),
    "a wide str.center": ("{{ 'a'.center(10**10) }}", "width"),
    "a wide zfill": ("{{ 'a'.zfill(10**10) }}", "width"),
    "wide tabs": ("{{ '\t'.expandtabs(10**10) }}", "width"),
    "a wide indent": ("{{ 'a\nb' | indent(10**10) }}", "width"),
    "many slices": ("{{ [1] | slice(10**9) | list }}", "width"),
    "a wide batch": ("{{ [1] | batch(10**9, 'x') | list }}", "width"),
    "a wide date": ("{{ strftime_now('%999999999d') }}", "width"),
    # numbers
    "a tower": ("{{ 10 ** (10 ** 10) }}", "bits"),
    "squares": (GROW.format(grown="ns.x * ns.x").replace("'ab'", "3"), "bits"),
    "powers": ("{{ 3 ** 99 ** 99 }}", "bits"),
    "products": ("{{ 2 ** 4000 * 2 ** 4000 }}", "bits"),
    "bytes of a number": ("{{ (1).to_bytes(10**10, 'big') }}", "unsafe"),
    "many digits": ("{{ 1.5 | round(10**9, 'ceil') }}", "20 digits"),
    # ways out
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "classes by a filter": ("{{ ('' | attr('__class__')).__mro__ }}", "unsafe|undefined"),
    "classes by an item": ("{{ ''['__class__'] }}{{ ''['__class__'].x }}", "unsafe"),
    "classes by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe|undefined"),
    "classes by format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}", "unsafe|undefined"),
    "globals of a function": ("{{ raise_exception.__globals__['os'] }}", "unsafe"),
    "globals of a class": ("{{ cycler.__init__.__globals__ }}{{ cycler.__init__.__globals__.os }}", "unsafe"),
    "globals by map": (
        "{{ [cycler] | map(attribute='__init__.__globals__') | map(attribute='x') | list }}", "unsafe|undefined"
    ),
    "the frame of a generator": ("{{ ([1] | map('string')).gi_frame.f_globals }}", "unsafe"),
    "the context": ("{{ self._TemplateReference__context.environment }}", "unsafe"),
    "a namespace's insides": ("{{ namespace(__class__=1) }}", "underscore"),
    "a namespace's insides later": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore|unsafe"),
    "translate": ("{{ 'a'.translate({97: 'b' * 9999}) }}", "unsafe"),
    "encode": ("{{ 'a'.encode('utf-32') }}", "unsafe"),
    "changed messages": ("{{ messages.append({}) }}", "unsafe"),
    "other files": ("{% include '/etc/passwd' %}", "no loader|not"),
    "lorem ipsum": ("{{ lipsum(n=10**9) }}", "undefined"),
    # sources
    "deep brackets": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "compiled|recursion"),
    "deep blocks": ("{% if 1 %}" * 2_000 + "{% endif %}" * 2_000, "compiled|recursion"),
    "deep loops": ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "compiled|nested"),
    "a long source": ("x" * (MAX_SOURCE + 1), "is the most"),
    "a long message": ("{{ raise_exception('a' * 1000000) }}", "a" * 250),
}  # fmt: skip
IN_A_CHILD = """
import json, resource, sys, time
from pathlib import Path
from data_tools.chat_template import ChatTemplate
from data_tools.errors import TemplateError
from data_tools.schema import Message
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 400 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, source in json.load(sys.stdin).items():
    start = time.process_time()
    try:
        ChatTemplate(source, path=Path("t"), tokens={}).render([Message("user", "Hi")], add_generation_prompt=True)
        said = None
    except TemplateError as error:
        said = str(error)
    print(json.dumps([name, said, time.process_time() - start]), flush=True)
"""


def test_every_attack_is_one_template_error() -> None:
    """In a process that may take 400 MiB more than it has; a single attack that got through would end it."""
    given = json.dumps({name: source for name, (source, _) in ATTACKS.items()})
    command = [sys.executable, "-c", IN_A_CHILD]
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, timeout=300, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in results] == list(ATTACKS), f"ended after {results[-1:]}: {done.stderr[-2000:]}"
    for name, said, seconds in results:
        assert said is not None, f"{name}: got through"
        assert len(said) < 500 and len(said.splitlines()) == 1
        assert any(word in said for word in ATTACKS[name][1].split("|")), f"{name}: {said}"
        assert seconds < 60, f"{name}: {seconds:.1f} s of CPU"


def test_what_templates_do_is_not_touched() -> None:
    source = (
        "{% set ns = namespace(text='', k=0) %}{% for m in messages %}{% set ns.text = ns.text ~ m.content[:3] + '!' %}"
        "{% set ns.k = ns.k + loop.length * 2 ** 3 %}{% endfor %}{{ ns.text }} {{ ns.k }} {{ 'a' * 3 }} "
        "{{ '%03d' % 7 }} "
        "{{ '{:>4}'.format(5) }} {{ 'x,y'.split(',') | join(';') }} {{ [3, 1] | sort | list }} {{ 2.45 | round(1) }} "
        "{{ 'ab' | replace('a', 'c') | upper | center(6) | trim }} {{ messages | map(attribute='role') | join(' ') }} "
        "{{ 'a\nb' | indent(2) }} {{ dict(a=1) | tojson }} {{ {'b': [1]} | tojson(indent=1) }}"
    )
    text = ChatTemplate(source, path=Path("t"), tokens={}).render(talk("Hello", "Hi"), add_generation_prompt=True)
    assert text == ('Hel!Hi! 32 aaa 007    5 x;y [1, 3] 2.5 CB user assistant a\n  b {"a": 1} {\n "b": [\n  1\n ]\n}')


def test_limits_grow_with_the_messages() -> None:
    """A conversation of ten million characters is rendered; a template that makes more of a short one is not."""
    long = talk("word " * 1_000_000, "word " * 1_000_000)
    template = ChatTemplate(CHATML, path=Path("t"), tokens={})
    assert len(template.render(long, add_generation_prompt=True)) > 10_000_000
    with pytest.raises(TemplateError, match="makes much more text than the messages hold"):
        repeat = "{{ messages[0].content * 1000000 }}"
        ChatTemplate(repeat, path=Path("t"), tokens={}).render(talk("word"), add_generation_prompt=True)


def test_a_budget_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(9999) %}{{ 'a' * 100 }}{% endfor %}", path=Path("t"), tokens={})
    lengths = {len(template.render(talk("Hi"), add_generation_prompt=True)) for _ in range(9)}
    assert lengths == {999_900}


def test_numbers_of_ordinary_size_are_numbers() -> None:
    text = ChatTemplate("{{ 2 ** 100 }} {{ 10 ** 9 * 10 ** 9 }}", path=Path("t"), tokens={})
    assert text.render(talk("Hi"), add_generation_prompt=True) == f"{2**100} {10**18}"
    assert 2**100 < 2**MAX_BITS
