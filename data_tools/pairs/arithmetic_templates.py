"""The word problems of `data_tools.pairs.arithmetic`: what is asked and how it is worked out. No sampling, no slips.

A template's numbers are called a to e; `NUMBER_RANGES` says how large each kind is. A step takes two of them, or the
result of an earlier step (r1, r2, ...), and its sentence shows the calculation at {x}. {name} and {other} are people,
{thing} is what they count.
"""

from dataclasses import dataclass

# Inclusive. Small on purpose: a small language model must be able to check each calculation.
NUMBER_RANGES = {"few": (2, 9), "small": (2, 20), "some": (11, 40), "many": (30, 90)}

NAMES = (
    "Amir Ben Carla Dana Elif Femi Grace Hugo Ines Jonas Kofi Lena Mina Nora Omar Petra Quinn Rosa Samir Tara Umar "
    "Vera Wei Yara Zoe Arash Bela Chen Darya Emil"
).split()
THINGS = (
    "pencils stickers marbles cards coins shells beads stamps buttons apples pears plums nuts cookies candles bricks "
    "balloons ribbons badges magnets"
).split()


@dataclass(frozen=True, slots=True)
class Step:
    """One line of working: `left op right`, shown at {x} of the sentence. Operands are a..e or r1..r4."""

    left: str
    op: str
    right: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Template:
    """A question, the range of each of its numbers, and the steps; the last step's result is the answer."""

    key: str
    question: str
    numbers: dict[str, str]
    steps: tuple[Step, ...]


TEMPLATES = (
    Template(
        "packs_then_gift",
        "{name} has {a} {thing}, buys {b} packs of {c} {thing} and gives {d} {thing} to {other}. "
        "How many {thing} does {name} have now?",
        {"a": "some", "b": "few", "c": "few", "d": "some"},
        (
            Step("b", "*", "c", "The packs hold {x} {thing}."),
            Step("a", "+", "r1", "With them {name} has {x} {thing}."),
            Step("r2", "-", "d", "After the gift that is {x} {thing}."),
        ),
    ),
    Template(
        "two_gifts",
        "{name} has {a} {thing}. {other} gets {b} of them and {c} are lost. How many {thing} are left?",
        {"a": "many", "b": "some", "c": "some"},
        (
            Step("a", "-", "b", "After the gift there are {x} {thing}."),
            Step("r1", "-", "c", "After the loss there are {x} {thing}."),
        ),
    ),
    Template(
        "shelves_and_table",
        "A room has {a} shelves with {b} books each and {c} more books on a table. How many books are in the room?",
        {"a": "few", "b": "few", "c": "some"},
        (
            Step("a", "*", "b", "The shelves hold {x} books."),
            Step("r1", "+", "c", "With the table that is {x} books."),
        ),
    ),
    Template(
        "shop_day",
        "A shop has {a} {thing}. It sells {b} in the morning and {c} in the afternoon, then {d} new ones arrive. "
        "How many {thing} does it have now?",
        {"a": "many", "b": "some", "c": "some", "d": "some"},
        (
            Step("b", "+", "c", "It sells {x} {thing}."),
            Step("a", "-", "r1", "That leaves {x} {thing}."),
            Step("r2", "+", "d", "Then it has {x} {thing}."),
        ),
    ),
    Template(
        "more_than_together",
        "{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?",
        {"a": "some", "b": "some"},
        (
            Step("a", "+", "b", "{other} has {x} {thing}."),
            Step("a", "+", "r1", "Together they have {x} {thing}."),
        ),
    ),
    Template(
        "fewer_than_together",
        "{name} has {a} {thing}. {other} has {b} fewer than {name}. How many {thing} do they have together?",
        {"a": "many", "b": "some"},
        (
            Step("a", "-", "b", "{other} has {x} {thing}."),
            Step("a", "+", "r1", "Together they have {x} {thing}."),
        ),
    ),
    Template(
        "times_as_many",
        "{name} has {a} {thing} and {other} {b} times as many. They lose {c}. How many {thing} are left to both?",
        {"a": "few", "b": "few", "c": "some"},
        (
            Step("a", "*", "b", "{other} has {x} {thing}."),
            Step("a", "+", "r1", "Together they have {x} {thing}."),
            Step("r2", "-", "c", "After the loss it is {x} {thing}."),
        ),
    ),
    Template(
        "change_from_a_note",
        "{name} buys {a} pens at ${b} each and a book for ${c}, and pays with ${d}. "
        "How many dollars of change are due?",
        {"a": "few", "b": "few", "c": "some", "d": "many"},
        (
            Step("a", "*", "b", "The pens cost {x} dollars."),
            Step("r1", "+", "c", "With the book it is {x} dollars."),
            Step("d", "-", "r2", "The change is {x} dollars."),
        ),
    ),
    Template(
        "bus_stops",
        "A bus carries {a} people. At one stop {b} get off and {c} get on, at the next {d} get off. "
        "How many people are on the bus then?",
        {"a": "many", "b": "some", "c": "some", "d": "some"},
        (
            Step("a", "-", "b", "{x} people stay."),
            Step("r1", "+", "c", "{x} people ride on."),
            Step("r2", "-", "d", "{x} people are left."),
        ),
    ),
    Template(
        "two_kinds_of_boxes",
        "{name} packs {a} small boxes with {b} {thing} each and {c} large boxes with {d} {thing} each. "
        "How many {thing} are packed?",
        {"a": "few", "b": "few", "c": "few", "d": "few"},
        (
            Step("a", "*", "b", "The small boxes hold {x} {thing}."),
            Step("c", "*", "d", "The large boxes hold {x} {thing}."),
            Step("r1", "+", "r2", "In all that is {x} {thing}."),
        ),
    ),
    Template(
        "saving_for_a_game",
        "{name} has ${a} and saves ${b} a week for {c} weeks. A game costs ${d}. How many dollars are still missing?",
        {"a": "some", "b": "few", "c": "few", "d": "many"},
        (
            Step("b", "*", "c", "{name} saves {x} dollars."),
            Step("a", "+", "r1", "That makes {x} dollars."),
            Step("d", "-", "r2", "Still missing are {x} dollars."),
        ),
    ),
    Template(
        "shared_after_finding",
        "{name} has {a} {thing} and finds {b} more. They are shared equally among {c} children. "
        "How many {thing} does each child get?",
        {"a": "some", "b": "some", "c": "few"},
        (
            Step("a", "+", "b", "There are {x} {thing}."),
            Step("r1", "/", "c", "Each child gets {x} {thing}."),
        ),
    ),
    Template(
        "rows_of_chairs",
        "A hall has {a} rows of {b} chairs. {c} chairs are carried out. How many chairs stay in the hall?",
        {"a": "few", "b": "few", "c": "some"},
        (
            Step("a", "*", "b", "At first there are {x} chairs."),
            Step("r1", "-", "c", "Then {x} chairs stay."),
        ),
    ),
    Template(
        "pages_left",
        "A book has {a} pages. {name} reads {b} pages on Monday and {c} on Tuesday. How many pages are left?",
        {"a": "many", "b": "some", "c": "some"},
        (
            Step("b", "+", "c", "{name} reads {x} pages."),
            Step("a", "-", "r1", "So {x} pages are left."),
        ),
    ),
    Template(
        "pages_every_day",
        "A book has {a} pages. {name} reads {b} pages a day for {c} days. How many pages are left?",
        {"a": "many", "b": "few", "c": "few"},
        (
            Step("b", "*", "c", "{name} reads {x} pages."),
            Step("a", "-", "r1", "So {x} pages are left."),
        ),
    ),
    Template(
        "there_and_back",
        "{name} walks {a} minutes to the market and {b} minutes on to the lake, then back the same way. "
        "How many minutes is that?",
        {"a": "some", "b": "few"},
        (
            Step("a", "+", "b", "The way there takes {x} minutes."),
            Step("r1", "+", "r1", "There and back takes {x} minutes."),
        ),
    ),
    Template(
        "ages",
        "{name} is {a} years old. {other} is {b} years older, and {other}'s cousin is {c} years younger than {other}. "
        "How old is the cousin?",
        {"a": "some", "b": "some", "c": "some"},
        (
            Step("a", "+", "b", "{other} is {x} years old."),
            Step("r1", "-", "c", "The cousin is {x} years old."),
        ),
    ),
    Template(
        "eggs",
        "On a farm {a} hens lay {b} eggs each. {c} eggs break and {d} are sold. How many eggs are left?",
        {"a": "few", "b": "few", "c": "few", "d": "some"},
        (
            Step("a", "*", "b", "The hens lay {x} eggs."),
            Step("r1", "-", "c", "{x} eggs are whole."),
            Step("r2", "-", "d", "{x} eggs are left."),
        ),
    ),
    Template(
        "tickets_with_voucher",
        "{a} adults pay ${b} each and {c} children pay ${d} each. A voucher takes ${e} off. "
        "How many dollars do they pay?",
        {"a": "few", "b": "few", "c": "few", "d": "few", "e": "some"},
        (
            Step("a", "*", "b", "The adults cost {x} dollars."),
            Step("c", "*", "d", "The children cost {x} dollars."),
            Step("r1", "+", "r2", "Together it is {x} dollars."),
            Step("r3", "-", "e", "They pay {x} dollars."),
        ),
    ),
    Template(
        "two_flower_beds",
        "One bed has {a} tulips, of which {b} wither. Another has {c} rows of {d} tulips. "
        "How many fresh tulips are there?",
        {"a": "some", "b": "few", "c": "few", "d": "few"},
        (
            Step("a", "-", "b", "The first bed keeps {x} tulips."),
            Step("c", "*", "d", "The other has {x} tulips."),
            Step("r1", "+", "r2", "In all there are {x} tulips."),
        ),
    ),
    Template(
        "rope",
        "A rope is {a} m long. {name} cuts off {b} pieces of {c} m and then one of {d} m. How many metres are left?",
        {"a": "many", "b": "few", "c": "few", "d": "few"},
        (
            Step("b", "*", "c", "The pieces take {x} m."),
            Step("a", "-", "r1", "After them {x} m are left."),
            Step("r2", "-", "d", "At the end {x} m are left."),
        ),
    ),
    Template(
        "three_rounds",
        "{name} scores {a} points, then {b} fewer, then {c} more than in the second round. "
        "How many points is that in all?",
        {"a": "some", "b": "few", "c": "few"},
        (
            Step("a", "-", "b", "Round two brings {x} points."),
            Step("r1", "+", "c", "Round three brings {x} points."),
            Step("a", "+", "r1", "The first two bring {x} points."),
            Step("r3", "+", "r2", "All three bring {x} points."),
        ),
    ),
    Template(
        "boxes_after_eating",
        "{name} bakes {a} rolls and eats {b}. The others go into {c} equal bags. How many rolls are in a bag?",
        {"a": "many", "b": "few", "c": "few"},
        (
            Step("a", "-", "b", "{x} rolls are packed."),
            Step("r1", "/", "c", "A bag holds {x} rolls."),
        ),
    ),
    Template(
        "car_park",
        "Of {a} parked cars {b} leave at noon and {c} rows of {d} cars at night. How many cars stay?",
        {"a": "many", "b": "some", "c": "few", "d": "few"},
        (
            Step("a", "-", "b", "{x} cars stay after noon."),
            Step("c", "*", "d", "{x} cars leave at night."),
            Step("r1", "-", "r2", "{x} cars stay."),
        ),
    ),
)

ONE_STEP = (
    Template(
        "buys_more",
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        {"a": "small", "b": "few"},
        (Step("a", "+", "b", "{name} has {x} {thing}."),),
    ),
    Template(
        "gives_away",
        "{name} has {a} {thing} and gives {b} of them to {other}. How many {thing} does {name} have left?",
        {"a": "small", "b": "few"},
        (Step("a", "-", "b", "{name} has {x} {thing} left."),),
    ),
    Template(
        "bags_of",
        "{name} packs {a} bags with {b} {thing} each. How many {thing} are in the bags?",
        {"a": "few", "b": "few"},
        (Step("a", "*", "b", "The bags hold {x} {thing}."),),
    ),
    Template(
        "older_than",
        "{name} is {a} years old. {other} is {b} years older. How old is {other}?",
        {"a": "small", "b": "few"},
        (Step("a", "+", "b", "{other} is {x} years old."),),
    ),
    Template(
        "pages_left",
        "A book has {a} pages. {name} has read {b} of them. How many pages are left to read?",
        {"a": "small", "b": "few"},
        (Step("a", "-", "b", "There are {x} pages left."),),
    ),
    Template(
        "both_together",
        "{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
        {"a": "small", "b": "few"},
        (Step("a", "+", "b", "Together they have {x} {thing}."),),
    ),
    Template(
        "rows_of_seats",
        "A hall has {a} rows with {b} seats in each row. How many seats does the hall have?",
        {"a": "few", "b": "few"},
        (Step("a", "*", "b", "The hall has {x} seats."),),
    ),
    Template(
        "how_many_more",
        "{name} has {a} {thing}. {other} has {b} {thing}. How many more {thing} does {name} have than {other}?",
        {"a": "small", "b": "few"},
        (Step("a", "-", "b", "{name} has {x} {thing} more."),),
    ),
)
