"""A generated task for a language model: sentences about shipments, to be entered into a book.

    On the third of May, Ada Brown sent twelve crates of lemons to Oslo.
    Waybill: 05-03 | Brown, A. | 12 | lemons | Oslo

    from embedded.waybills import waybills_task

    task = waybills_task(seed=0, count=512)
    task.train[0]["prompt"], task.train[0]["completion"]

Dates and numbers are to be written as digits, names to be turned round and shortened. An entry is
right when every character is. Names, goods and towns of validation and test are in no training
sentence. Everything is made up here from lists of words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Row = dict[str, str]


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Ada Alice Anna Arthur Ben Bruno Carl Clara Daisy David Edith Emil Ethel Felix Flora Frank "
    "George Grace Harold Helen Henry Ida Irene Jack James Jane Julia Karl Laura Leo Lily Louis "
    "Lucy Mabel Martha Max Nina Nora Olga Oscar Otto Paul Peter Rosa Ruth Sarah Simon Stella "
    "Thomas Victor Vera Walter"
)
LAST_NAMES = _words(
    "Abbott Adams Archer Baker Barnes Bell Bishop Brooks Brown Burton Carter Clark Cole Cooper "
    "Dawson Dixon Ellis Fisher Fleming Foster Gibson Grant Gray Harper Hill Holmes Howard "
    "Hughes Jordan Kelly Knight Lambert Lane Marsh Mason Miller Morgan Nelson Norris Palmer "
    "Parker Porter Quinn Reed Rhodes Ross Russell Shaw Spencer Stone Taylor Turner Walsh Ward "
    "Watson Webb West Wood Wright Young"
)
GOODS = _words(
    "almonds apples apricots barley beans beets blankets books boots bricks brooms butter "
    "buttons candles carrots cheese cherries chestnuts cider clocks coal coffee copper cotton "
    "dates eggs feathers figs flax flour garlic ginger glass grapes hats hemp herbs honey hops "
    "iron lamps lead leather lemons lentils limes linen mirrors mustard nails needles oats "
    "olives onions oranges paper peaches pears peas pepper plums pots quills raisins rice ropes "
    "rum saddles salt silk soap spades sugar tar tea tiles timber tin tools turnips vinegar "
    "walnuts wax wheat wine wool"
)
TOWNS = _words(
    "Athens Bergen Berlin Bern Bilbao Boston Bremen Bristol Brussels Cadiz Cairo Calais Cork "
    "Danzig Delhi Derby Dover Dublin Dundee Exeter Florence Geneva Genoa Ghent Glasgow Hamburg "
    "Havana Hull Kiel Leeds Leipzig Lima Lisbon London Lyon Madrid Malaga Malta Marseille Milan "
    "Munich Nantes Naples Odessa Oporto Oslo Ostend Oxford Palermo Paris Perth Pisa Prague Riga "
    "Rome Rouen Seville Siena Smyrna Turin Utrecht Venice Verona Vienna Warsaw York Zurich"
)
MONTHS = _words(
    "January February March April May June July August September October November December"
)
UNITS = ("bags", "barrels", "boxes", "carts", "chests", "crates", "sacks")
ONES = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth "
    "twenty-first twenty-second twenty-third twenty-fourth twenty-fifth twenty-sixth "
    "twenty-seventh twenty-eighth"
)
SENTENCES = (
    "On the {day} of {month}, {first} {last} sent {count} {unit} of {goods} to {town}.",
    "{first} {last} shipped {count} {unit} of {goods} to {town} on the {day} of {month}.",
    "To {town}, on the {day} of {month}: {count} {unit} of {goods} from {first} {last}.",
    "By order of {first} {last}, {count} {unit} of {goods} go to {town} on the {day} of {month}.",
    "On the {day} of {month} {count} {unit} of {goods} left for {town}, by {first} {last}.",
)


@dataclass(frozen=True)
class WaybillsTask:
    """Rows with a "prompt" and a "completion"."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def waybills_task(seed: int = 0, count: int = 512, held_out: int = 200) -> WaybillsTask:
    """Draw training rows by the seed; validation and test are the same for every seed.

    Args:
        seed: decides the training rows.
        count: how many of them.
        held_out: how many rows validation and test have each.
    """
    return WaybillsTask(
        train=_rows("train", count, random.Random(f"train {seed}")),
        validation=_rows("validation", held_out, random.Random("validation")),
        test=_rows("test", held_out, random.Random("test")),
    )


def words_of(part: str, words: list[str]) -> list[str]:
    """Return the words of a list that a part uses: of each five, three, one and one."""
    places = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[part]
    return [word for place, word in enumerate(words) if place % 5 in places]


def number_in_words(number: int) -> str:
    """Return a number from 1 to 99 in words.

    Example:
        >>> number_in_words(42)
        'forty-two'
    """
    if number < 20:
        return ONES[number - 1]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones - 1]}" if ones else "")


def _rows(part: str, count: int, rng: random.Random) -> list[Row]:
    firsts, lasts, goods, towns = (
        words_of(part, words) for words in (FIRST_NAMES, LAST_NAMES, GOODS, TOWNS)
    )
    rows = []
    for _ in range(count):
        day, month, number = rng.randint(1, 28), rng.randint(1, 12), rng.randint(2, 99)
        first, last = rng.choice(firsts), rng.choice(lasts)
        what, town = rng.choice(goods), rng.choice(towns)
        sentence = rng.choice(SENTENCES).format(
            day=ORDINALS[day - 1],
            month=MONTHS[month - 1],
            first=first,
            last=last,
            count=number_in_words(number),
            unit=rng.choice(UNITS),
            goods=what,
            town=town,
        )
        entry = f"{month:02}-{day:02} | {last}, {first[0]}. | {number} | {what} | {town}"
        rows.append({"prompt": f"{_capital(sentence)}\nWaybill:", "completion": f" {entry}"})
    return rows


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
