"""Write tests/assets/c4_test: small English prose documents, made up by the word lists and sentence frames below.

    python scripts/make_assets.py [--out tests/assets/c4_test] [--documents 320]

Golden values depend on these files, so they are shipped; this script is how they came about. Nothing in them is quoted.
"""

import argparse
import json
import re
from pathlib import Path
from random import Random

WORDS = {
    "place": """harbour, workshop, orchard, library, station, kitchen, observatory, mill, greenhouse, school, market,
        lighthouse, archive, bakery""",
    "person": """the gardener, an old carpenter, our teacher, the night watchman, a young engineer, the librarian,
        Mrs Öztürk, the baker's son, a retired sailor, the surveyor, Dr Lindqvist, the apprentice, two visitors,
        a clockmaker, the ferryman, Miss Amari""",
    "thing": """brass lamp, rope, ledger, wooden frame, kettle, map, bicycle, telescope, water pump, loaf, seed tray,
        bookcase, window, bell, copper pipe, lantern, basket, stone wall, notebook, pulley, letter, barometer, ladder,
        loom, compass, plough, oven, hinge""",
    "trait": """heavy, narrow, well-kept, weathered, simple, costly, quiet, stubborn, bright, uneven, careful, unusual,
        reliable, half-finished, familiar, delicate, practical, slow, curious, ordinary""",
    "deed": """repaired, measured, carried, painted, described, borrowed, cleaned, sketched, weighed, moved, examined,
        sold, replaced, labelled, hid, rebuilt""",
    "time": """before sunrise, in late autumn, after the second rain, every Thursday, during the long winter, at noon,
        by the end of May, when the tide was low, on the shortest day, for three weeks, in 1974, once a month,
        between two storms, that evening""",
    "reason": """the wood had begun to swell, nobody remembered the rule, the price had doubled, warm air rises,
        water follows the easiest path, a small error grows with each copy, iron rusts faster near the sea,
        the light fades early there, practice matters more than talent, plants lean towards the sun,
        a straight line is not always the shortest walk, the old method still worked, no two measurements agreed,
        habit is stronger than advice""",
    "lesson": """Measure twice before the first cut., A good tool is one that is put back.,
        What is not written down is soon argued about., Begin with the part that cannot be changed.,
        Most delays come from waiting for someone else., It is easier to keep a thing dry than to dry it.,
        Leave room for the thing you have forgotten., The second attempt is usually the honest one.,
        Ask who will use it when you are gone.""",
}
FRAMES = (
    "{time_} {person} {deed} the {thing} because {reason}.",
    "The {thing} in the {place} was {trait}, and {person} said so.",
    "{person} {deed} a {trait} {thing} and left it near the {place}.",
    "It took {number} attempts until the {thing} was {trait} enough.",
    "Although {reason}, {person} {deed} the {trait} {thing} {time}.",
    "Between the {place} and the {place2} lie {number} steps; {person} counted them {time}.",
    "“Is the {thing} {trait}?” asked {person}. “Only {time},” came the answer.",
    "You need a {thing}, a {thing2} and {number} minutes of patience.",
    "{lesson}",
    "A {trait} {place} is worth more than a {trait2} one, since {reason}.",
    "If the {thing} is {trait}, then the {thing2} must be {trait2}; {person} never doubted it.",
    "They paid {number} coins for the {thing}, which {person} had {deed} {time}.",
)
TITLES = ("Notes from the {place}", "How {person} {deed} the {thing}", "On the {trait} {thing}", "A day at the {place}")


def sentence(rng: Random, frame: str) -> str:
    """The frame with its blanks filled, beginning with a capital letter."""
    lists = {name: [" ".join(x.split()) for x in words.split(",")] for name, words in WORDS.items()}
    filled = {name: rng.choice(words) for name, words in lists.items()}
    more = {f"{name}2": rng.choice(lists[name]) for name in ("place", "thing", "trait")}
    text = frame.format(**filled, **more, time_=filled["time"], number=rng.randint(2, 90))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def document(rng: Random) -> str:
    """A title and one to six paragraphs; their lengths differ widely, as those of real pages do."""
    paragraphs = [sentence(rng, rng.choice(TITLES))]
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6))):
        paragraphs.append(" ".join(sentence(rng, rng.choice(FRAMES)) for _ in range(rng.randint(2, 9))))
    return "\n".join(paragraphs)


def main() -> None:
    """Write the documents to two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/assets/c4_test"))
    parser.add_argument("--documents", type=int, default=320)
    args = parser.parse_args()
    rng = Random(20)
    lines = [json.dumps({"text": document(rng)}, ensure_ascii=False) + "\n" for _ in range(args.documents)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("part-0.jsonl", lines[::2]), ("part-1.jsonl", lines[1::2])):
        (args.out / name).write_text("".join(part), encoding="utf-8")
    print(f"{args.out}: {len(lines)} documents, {sum(map(len, lines))} characters")


if __name__ == "__main__":
    main()
