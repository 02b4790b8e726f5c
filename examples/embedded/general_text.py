"""What a language model should still know after it was adapted: questions of all kinds, and a text.

    from embedded.general_text import questions, reference_text

    questions()[0]           # "What is the capital of Norway?"
    reference_text()[:60]    # of Python's language reference

The questions are written here, by topic: some topics are there to be trained on ("rehearsal"), the
others to ask ("asked"). The text is Python's own language reference, as its
help system has it in every installation (PSF licence).
"""

from __future__ import annotations

import pydoc_data.topics
from itertools import zip_longest
from typing import Literal

ASKED = {
    "What is the capital of {}?": (
        "France, Italy, Spain, Germany, Norway, Japan, Egypt, Canada, Greece, Poland, Portugal, "
        "Russia, China, Cuba, Austria, Hungary, Ireland, Kenya, Peru, Turkey"
    ),
    "What is the opposite of '{}'?": (
        "hot, big, fast, happy, light, old, early, full, high, hard, rich, long, wet, strong, "
        "empty, clean, near, sharp, thick, quiet"
    ),
    "Write one sentence about {}.": (
        "the sea, a dog, winter, the moon, a train, music, the forest, bread, a teacher, rain, a "
        "bridge, the desert, a library, football, the city, a garden, a horse, the stars, a "
        "doctor, friendship"
    ),
    "Explain in one sentence what {} is.": (
        "gravity, a volcano, photosynthesis, an atom, democracy, a computer, inflation, a "
        "vaccine, electricity, a poem, evolution, a glacier, an enzyme, a telescope, a planet, a "
        "battery, an earthquake, a virus, oxygen, a contract"
    ),
    "Name three {}.": (
        "fruits, colors, animals, countries, planets, musical instruments, vegetables, sports, "
        "rivers, metals, birds, cities, languages, flowers, tools, trees, oceans, insects, "
        "mountains, languages of computers"
    ),
    "Is it true that {}?": (
        "the sun is a star, fish can fly, water boils at 100 degrees Celsius, the earth is flat, "
        "whales are mammals, snow is hot, iron is a metal, cats can bark, plants need light, two "
        "is larger than three, ice floats on water, spiders have eight legs, the moon is made of "
        "cheese, gold is heavy, bats are blind, glass is made of sand, birds have feathers, "
        "diamonds are soft, honey is sweet, lead is lighter than air"
    ),
    "In which season {}?": (
        "do leaves fall, does snow melt, do people ski, are strawberries picked, do birds fly "
        "south, is grain harvested, do tulips bloom, are days the longest, is it the coldest, do "
        "people swim in lakes, are pumpkins carved, do lambs come into the world, are apples "
        "picked, do bears wake up, do ponds freeze, are mushrooms gathered, do cherry trees "
        "bloom, are nights the longest, do people rake leaves, is grass mown"
    ),
    "How do you say '{}' in Spanish?": (
        "good morning, thank you, house, water, friend, bread, book, please, night, green, mother, "
        "brother, milk, street, school, goodbye, window, table, yesterday, shoe"
    ),
    "Who {}?": (
        "wrote Hamlet, painted the Mona Lisa, discovered penicillin, invented the telephone, "
        "walked on the moon first, composed the Ninth Symphony, wrote Don Quixote, proposed the "
        "theory of relativity, was the first president of the United States, sailed to America in "
        "1492, wrote The Origin of Species, found the law of gravity, painted Guernica, wrote "
        "The Odyssey, invented the light bulb, discovered radium, wrote War and Peace, built the "
        "first printing press, sculpted David, wrote Faust"
    ),
    "What is made from {}?": (
        "wool, flour, grapes, clay, steel, leather, rubber, olives, cocoa, cotton, sand, wood "
        "pulp, tomatoes, sugar cane, gold, wax, soybeans, silk, cream, cabbage"
    ),
    "What do people need for {}?": (
        "fishing, baking a cake, a camping trip, sewing, gardening, a wedding, playing chess, an "
        "interview, painting a wall, skiing, a picnic, washing a car, climbing, an exam, a "
        "journey by sea, a barbecue, mending a bicycle, making coffee, cutting hair, sending a "
        "parcel"
    ),
    "Which word rhymes with '{}'?": (
        "cat, light, rain, tree, stone, day, bell, moon, ring, gold, sand, fire, snow, king, ship, "
        "boat, mouse, chair, blue, round"
    ),
}
REHEARSAL = {
    "What color is {}?": (
        "grass, the sky, snow, a lemon, blood, coal, an orange, a frog, milk, gold, a strawberry, "
        "chocolate, the sun, a flamingo, an emerald, a crow, a carrot, a violet, ivory, a polar "
        "bear"
    ),
    "What does a {} do?": (
        "baker, farmer, pilot, judge, nurse, painter, plumber, chef, driver, fisherman, "
        "carpenter, dentist, lawyer, gardener, librarian, mechanic, sailor, tailor, writer, "
        "firefighter"
    ),
    "Use the word '{}' in a sentence.": (
        "bright, river, quickly, window, remember, silver, careful, mountain, yesterday, "
        "question, laugh, simple, journey, voice, promise, dark, market, strange, begin, summer"
    ),
    "Give me a short tip for {}.": (
        "sleeping well, learning a language, saving money, cooking rice, running, writing a "
        "letter, packing a suitcase, growing tomatoes, staying calm, cleaning a kitchen, reading "
        "more, making friends, drawing, public speaking, taking photographs, hiking, studying, "
        "swimming, keeping warm, buying a bicycle"
    ),
    "Which animal {}?": (
        "barks, gives milk, lays eggs, builds dams, has a trunk, sleeps in winter, makes honey, "
        "hunts mice, has stripes, carries a shell, lives in a hive, can fly backwards, has a "
        "pouch, spins webs, has a long neck, sings at night, changes its color, swims upstream, "
        "pulls a sleigh, has eight arms"
    ),
    "Tell me a fact about {}.": (
        "Mars, Rome, elephants, salt, the Nile, paper, bees, ice, Shakespeare, sharks, bicycles, "
        "tea, bones, lightning, chess, penguins, the brain, coins, bamboo, the compass"
    ),
}


def questions(which: Literal["asked", "rehearsal"] = "asked") -> list[str]:
    """Return 240 or 120 questions, topic by topic in turn; the two have no topic in common."""
    topics = ASKED if which == "asked" else REHEARSAL
    by_topic = [
        [question.format(words) for words in things.split(", ")]
        for question, things in topics.items()
    ]
    return [text for some in zip_longest(*by_topic) for text in some if text is not None]


def reference_text() -> str:
    """Return all topics of Python's language reference, one after the other."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name].strip() for name in sorted(topics))
