"""Fresh English of a grammar of our own: sentences that nobody wrote before, from a seed."""

import re

import numpy as np

# The phrases of each slot, between commas.
_WORDS: dict[str, tuple[str, ...]] = {
    slot: tuple(phrase.strip() for phrase in phrases.split(","))
    for slot, phrases in {
        "onset": (
            "Bra, Cor, Del, Elm, Fen, Gar, Hol, Ist, Jor, Kel, Lum, Mar, Nor, Ost, Pel, Quin, Rav, Sel, Tor, Ulv, Ver, Wes, "
            "Yar, Zim"
        ),
        "coda": (
            "adel, berg, cote, dale, ester, field, grave, holt, ina, jana, kov, lind, mere, nessa, ora, pek, quay, rick, "
            "stad, tine, una, vik, wold, yard"
        ),
        "given": (
            "Ada, Bruno, Celia, Dario, Edda, Felix, Greta, Hugo, Ines, Jonas, Klara, Leo, Mina, Nils, Olga, Pablo, Rosa, "
            "Silas, Tilda, Ugo, Vera, Willem, Xenia, Yusuf, Zelda"
        ),
        "trade": (
            "clockmaker, ferryman, botanist, glassblower, postmaster, surveyor, baker, printer, violinist, beekeeper, "
            "locksmith, midwife, cartographer, miller, dyer, astronomer, weaver, notary, gardener, diver"
        ),
        "thing": (
            "lantern, ledger, barometer, copper kettle, map, violin, bell, compass, barrel of salt, sundial, telescope, loom, "
            "letter, sack of barley, music box, anchor, mirror, wagon, kite, stove"
        ),
        "quality": (
            "cracked, borrowed, unusually heavy, half-finished, painted, rusted, famous, nearly new, hollow, gilded, crooked, "
            "silent, blue, forgotten, enormous, delicate"
        ),
        "animal": "heron, mule, fox, goat, swarm of bees, pike, raven, grey cat, otter, hedgehog, lame horse, hare",
        "place": (
            "the customs house, the north pier, a cellar, the old observatory, the market square, a barn, the chapel, the "
            "third bridge, the salt road, an orchard, the reading room, the tannery, the signal tower, the cemetery wall"
        ),
        "month": "January, March, April, May, June, August, September, October, November, December",
        "reason": (
            "because the river had frozen early, for want of better paper, to settle a bet, although no one had asked, before "
            "the tax collector arrived, while the choir was still singing, after the second flood, in spite of the doctor, so "
            "that the children would remember, as if it had always belonged there"
        ),
        "verb": "repaired, sold, hid, measured, inherited, drew, buried, returned, stole, weighed, described, carried",
        "matter": (
            "the price of wool, a missing key, the weather, her brother's debts, an eclipse, the new railway, two lost hens, "
            "the shape of the coast, a broken promise, the taste of the water, a patent, the width of the gate"
        ),
        "number": "three, seven, eleven, fourteen, nineteen, twenty-six, forty, fifty-two, ninety, two hundred",
        "unit": "crowns, days, miles, pages, letters, loaves, steps, witnesses, candles, planks",
    }.items()
}
_SENTENCES = (
    "{given} {name}, a {trade} from {town}, {verb} the {quality} {thing} {reason}.",
    "In {month} {year} the {trade} {verb} {number} {unit} and wrote to {given} about {matter}.",
    "Nobody in {town} could say who had left the {thing} in {place}.",
    "The {animal} that lived behind {place} was worth {number} {unit}, or so {given} believed.",
    '"It is only a {quality} {thing}," said {given}, "but I would not part with it for {number} {unit}."',
    "Between {town} and {town} there are {number} inns, and in each of them one hears about {matter}.",
    "{given} and {given} quarreled over {matter} until the {animal} got into {place}.",
    "According to the {trade}'s notes of {year}, the {thing} was found near {place}, {number} {unit} from the road.",
    "The {quality} {thing} stood in {place} for {number} years {reason}.",
    "When the {trade} died, {given} {name} {verb} the {thing} and moved to {town}.",
    "Every {month} the people of {town} carry a {thing} to {place} and speak of {matter}.",
    "She had counted {number} {unit} before she saw that the {animal} was gone.",
    "A {trade} is seldom asked about {matter}, and {given} {name} least of all.",
    "They {verb} it twice, once in {year} and once {reason}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


def fluent_text(rng: np.random.Generator, n_sentences: int) -> str:
    """So many sentences. Names of people and towns are put together anew each time."""
    return " ".join(_filled(str(rng.choice(_SENTENCES)), rng) for _ in range(n_sentences))


def salad_text(rng: np.random.Generator, n_words: int) -> str:
    """So many of the grammar's words, drawn one by one in no order."""
    return " ".join(rng.choice(_VOCABULARY, n_words).tolist())


def _filled(sentence: str, rng: np.random.Generator) -> str:
    def drawn(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in ("name", "town"):
            return str(rng.choice(_WORDS["onset"])) + str(rng.choice(_WORDS["coda"]))
        return str(rng.integers(1480, 1930)) if slot == "year" else str(rng.choice(_WORDS[slot]))

    return _SLOT.sub(drawn, sentence)


_PHRASES = [phrase for slot in sorted(set(_WORDS) - {"onset", "coda"}) for phrase in _WORDS[slot]]
_TEXTS = [*(_SLOT.sub("", sentence) for sentence in _SENTENCES), *_PHRASES]
_VOCABULARY = sorted({word for text in _TEXTS for word in re.findall(r"[A-Za-z][a-z]+", text)})
