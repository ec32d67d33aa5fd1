"""Plain facts about the sources, and the sentences made of them that a map of text learns and is judged on.

A sentence is a template with a wording put in. Some templates and some wordings are kept for validation, others for
test: a sentence of a part holds a template or a wording that no sentence of another part has. What fits several
sources is labelled with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lolgen.language.texts import SOURCES

PARTS = ("train", "validation", "test")
KINDS = ("name", "century", "time", "party", "event", "none")


class Facts(NamedTuple):
    """`names`: the full name first; `terms`: (first year, year of leaving); `events`: each in one or more wordings."""

    names: tuple[str, ...]
    terms: tuple[tuple[int, int], ...]
    party: str
    events: tuple[tuple[str, ...], ...]


class Time(NamedTuple):
    """Years `first` to `last`, both counted; `nouns`: "in ..." wordings; `adjectives`: "... president" wordings."""

    first: int
    last: int
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]


@dataclass(frozen=True)
class Phrase:
    """A sentence of one part; `sources` share its label equally, none of them for text that fits no source."""

    text: str
    sources: tuple[str, ...]
    part: str
    kind: str


FACTS: dict[str, Facts] = {
    "jackson": Facts(("Andrew Jackson", "President Jackson", "Old Hickory"), ((1829, 1837),), "Democratic", (
        ("the fight over the Bank of the United States", "closing the national bank", "the Bank War"),
        ("the nullification crisis in South Carolina", "a state that would not obey the tariff"),
        ("the removal of the Indian tribes beyond the Mississippi", "the Indian Removal Act"),
        ("paying off the whole national debt", "a nation without public debt"),
    )),
    "van-buren": Facts(("Martin Van Buren", "President Van Buren"), ((1837, 1841),), "Democratic", (
        ("the Panic of 1837", "banks that stopped paying in coin", "the bank failures of 1837"),
        ("the independent treasury", "keeping public money out of private banks"),
        ("the burning of the steamer Caroline on the Canadian border", "the Caroline affair"),
        ("the Seminole war in Florida", "fighting the Seminoles"),
    )),
    "polk": Facts(("James K. Polk", "President Polk", "James Knox Polk"), ((1845, 1849),), "Democratic", (
        ("the war with Mexico", "the Mexican War", "American troops in Mexico City"),
        ("the annexation of Texas", "Texas joins the Union"),
        ("the Oregon boundary with Great Britain", "the Oregon question"),
        ("the discovery of gold in California", "the first news of Californian gold"),
    )),
    "buchanan": Facts(("James Buchanan", "President Buchanan"), ((1857, 1861),), "Democratic", (
        ("the Lecompton constitution and Kansas", "slavery in the Kansas Territory", "bleeding Kansas"),
        ("the expedition against the Mormons in Utah", "the Utah war"),
        ("the Dred Scott decision", "the ruling of the Supreme Court on slaves in the territories"),
        ("southern states about to secede", "the secession winter"),
    )),
    "lincoln": Facts(("Abraham Lincoln", "President Lincoln", "Honest Abe"), ((1861, 1865),), "Republican", (
        ("the Civil War", "the rebellion of the southern states", "the war between North and South"),
        ("the Emancipation Proclamation", "freeing the slaves"),
        ("the Homestead Act", "free land for settlers who farm it"),
        ("colonization and compensated emancipation", "paying states that give up slavery"),
    )),
    "grant": Facts(("Ulysses S. Grant", "President Grant", "Ulysses Grant"), ((1869, 1877),), "Republican", (
        ("the reconstruction of the South", "the southern states after the Civil War",
            "the readmission of rebel states"),
        ("the Alabama claims against Great Britain", "arbitration at Geneva over the Alabama"),
        ("the proposal to annex Santo Domingo", "bringing Santo Domingo into the Union"),
        ("the Ku Klux Klan acts", "federal force against the Klan"),
    )),
    "cleveland": Facts(("Grover Cleveland", "President Cleveland", "Stephen Grover Cleveland"),
        ((1885, 1889), (1893, 1897)), "Democratic", (
        ("the repeal of the silver purchase law", "the end of silver buying", "the Panic of 1893"),
        ("lowering a tariff that fills the treasury too full", "the surplus and the tariff"),
        ("the Venezuela boundary and the Monroe Doctrine", "the quarrel with Britain over Venezuela"),
        ("civil service reform and the abuse of pensions", "vetoes of private pensions"),
    )),
    "mckinley": Facts(("William McKinley", "President McKinley"), ((1897, 1901),), "Republican", (
        ("the war with Spain over Cuba", "the Spanish-American War", "the destruction of the battleship Maine"),
        ("the government of the Philippines after Spain", "taking the Philippine Islands"),
        ("the annexation of Hawaii", "the Hawaiian Islands join the United States"),
        ("the Boxer uprising in China", "the legations besieged at Peking"),
    )),
    "theodore-roosevelt": Facts(("Theodore Roosevelt", "Teddy Roosevelt"), ((1901, 1909),), "Republican", (
        ("the control of the great trusts", "trust busting", "the square deal"),
        ("the building of the Panama Canal", "a canal across the isthmus"),
        ("the conservation of forests and wild lands", "national forests and irrigation of dry lands"),
        ("a strong navy and the Great White Fleet", "more battleships for the navy"),
    )),
    "taft": Facts(("William Howard Taft", "President Taft", "William H. Taft"), ((1909, 1913),), "Republican", (
        ("the Payne-Aldrich tariff and the tariff board", "a board of experts on the tariff", "the tariff of 1909"),
        ("dollar diplomacy", "American loans in place of bullets"),
        ("trade reciprocity with Canada", "the failed trade agreement with Canada"),
        ("economy and efficiency in the departments", "a budget for the whole government"),
    )),
    "wilson": Facts(("Woodrow Wilson", "President Wilson"), ((1913, 1921),), "Democratic", (
        ("the First World War", "the war against imperial Germany", "World War One"),
        ("the League of Nations", "a covenant of nations for peace"),
        ("the creation of the Federal Reserve", "the Federal Reserve Act"),
        ("self-government for the Filipinos and trouble with Huerta in Mexico", "refusing to recognise Huerta"),
    )),
    "coolidge": Facts(("Calvin Coolidge", "President Coolidge", "Silent Cal"), ((1923, 1929),), "Republican", (
        ("thrift in government and tax cuts in the twenties", "constructive economy", "cutting taxes in the 1920s"),
        ("the Kellogg-Briand pact against war", "a treaty that renounces war"),
        ("the Dawes plan and the debts of the Allies", "the war debts of Europe"),
        ("help for farmers, Muscle Shoals and prohibition", "the prohibition law and the farm surplus"),
    )),
    "franklin-roosevelt": Facts(("Franklin D. Roosevelt", "Franklin Delano Roosevelt", "FDR"),
        ((1933, 1945),), "Democratic", (
        ("the New Deal", "relief and public works for the jobless", "putting the unemployed back to work"),
        ("the Second World War against Hitler and Japan", "the attack on Pearl Harbor"),
        ("the four freedoms", "freedom from want and freedom from fear"),
        ("the Social Security Act", "the first old age pensions of the nation"),
    )),
    "truman": Facts(("Harry S. Truman", "President Truman", "Harry Truman"), ((1945, 1953),), "Democratic", (
        ("the Marshall Plan for Europe", "American aid to rebuild Europe", "the European Recovery Program"),
        ("the Korean War", "communist aggression in Korea"),
        ("the Fair Deal", "price control and housing after the war"),
        ("the atomic bomb and the start of the Cold War", "atomic energy after Hiroshima"),
    )),
    "nixon": Facts(("Richard Nixon", "President Nixon", "Richard M. Nixon"), ((1969, 1974),), "Republican", (
        ("ending the war in Vietnam with honor", "the end of the Vietnam War", "bringing the troops home from Vietnam"),
        ("revenue sharing with the states", "the New Federalism"),
        ("the opening to China", "the journey to Peking to meet Mao"),
        ("Watergate", "the Watergate scandal"),
    )),
    "carter": Facts(("Jimmy Carter", "President Carter", "James Earl Carter"), ((1977, 1981),), "Democratic", (
        ("the American hostages in Iran", "the hostages in Tehran", "the Iran hostage crisis"),
        ("the Camp David accords between Egypt and Israel", "Sadat and Begin at Camp David"),
        ("the energy crisis and synthetic fuels", "dependence on foreign oil in the seventies"),
        ("human rights and the Panama Canal treaties", "handing the canal back to Panama"),
    )),
    "reagan": Facts(("Ronald Reagan", "President Reagan", "Ronald Wilson Reagan"), ((1981, 1989),), "Republican", (
        ("the Strategic Defense Initiative", "a shield in space against missiles", "Star Wars missile defense"),
        ("tax cuts and smaller government in the eighties", "Reaganomics"),
        ("the freedom fighters in Nicaragua", "aid for the Contras"),
        ("arms talks with Gorbachev", "the treaty on intermediate nuclear missiles with the Soviets"),
    )),
    "clinton": Facts(("Bill Clinton", "President Clinton", "William Jefferson Clinton"), ((1993, 2001),),
        "Democratic", (
        ("welfare reform", "ending welfare as we know it", "moving people from welfare to work"),
        ("a bridge to the twenty-first century", "getting ready for the new millennium"),
        ("the first balanced budget in decades", "the budget surplus of the nineties"),
        ("the North American free trade agreement and peace in Bosnia", "peacekeepers in Bosnia and Kosovo"),
    )),
    "obama": Facts(("Barack Obama", "President Obama", "Barack Hussein Obama"), ((2009, 2017),), "Democratic", (
        ("the Affordable Care Act", "health insurance for everyone", "Obamacare"),
        ("the recovery from the Great Recession", "rescuing the car makers after the financial crisis"),
        ("the raid that killed Osama bin Laden", "the fight against al Qaeda and ISIL"),
        ("clean energy and climate change", "the Paris agreement on the climate"),
    )),
}  # fmt: skip
"""Source -> facts, in the order of SOURCES."""

CENTURIES: tuple[Time, ...] = (
    Time(1801, 1900, ("the nineteenth century", "the 19th century", "the years from 1801 to 1900", "the 1800s"),
        ("a nineteenth century", "a 19th century", "a nineteenth-century American", "an 1800s")),
    Time(1901, 2000, ("the twentieth century", "the 20th century", "the years from 1901 to 2000", "the last century"),
        ("a twentieth century", "a 20th century", "a twentieth-century American", "a 20th-century")),
    Time(2001, 2100, ("the twenty-first century", "the 21st century", "the years after 2001", "our own century"),
        ("a twenty-first century", "a 21st century", "a twenty-first-century American", "a 21st-century")),
)  # fmt: skip

TIMES: tuple[Time, ...] = (
    Time(1829, 1850, ("the first half of the nineteenth century", "the early nineteenth century", "the early 1800s"),
        ("an early nineteenth century", "an early 19th century")),
    Time(1850, 1869, ("the middle of the nineteenth century", "the mid 1800s"), ("a mid nineteenth century",)),
    Time(1870, 1900, ("the late nineteenth century", "the late 1800s"), ("a late nineteenth century",)),
    Time(1901, 1929, ("the early twentieth century", "the early 1900s"), ("an early twentieth century",)),
    Time(1930, 1969, ("the middle of the twentieth century", "the mid 1900s"), ("a mid twentieth century",)),
    Time(1970, 2000, ("the late twentieth century", "the late 1900s"), ("a late twentieth century",)),
    Time(1829, 1860, ("the years before the Civil War", "the antebellum age"), ("an antebellum", "a pre-Civil War")),
    Time(1861, 1864, ("the Civil War years", "the time of the Civil War"), ("a Civil War",)),
    Time(1865, 1876, ("the Reconstruction era", "the years after the Civil War"), ("a Reconstruction era",)),
    Time(1870, 1900, ("the Gilded Age", "the age of railroads and robber barons"), ("a Gilded Age",)),
    Time(1901, 1916, ("the Progressive Era", "the age of progressive reform"), ("a Progressive Era",)),
    Time(1917, 1918, ("the First World War", "the Great War"), ("a First World War",)),
    Time(1923, 1928, ("the Roaring Twenties", "the jazz age"), ("a jazz age",)),
    Time(1930, 1939, ("the Great Depression", "the Depression years"), ("a Depression era",)),
    Time(1941, 1944, ("the Second World War", "World War Two"), ("a Second World War", "a World War II")),
    Time(1947, 1988, ("the Cold War", "the years of the Soviet threat"), ("a Cold War",)),
    Time(1970, 2016, ("modern times", "recent decades", "the age of television"),
        ("a modern", "a recent", "a present-day")),
    Time(1829, 1900, ("olden times", "the days of the horse and carriage"), ("an old-fashioned", "an old-time")),
)  # fmt: skip

DECADES = {
    182: "twenties", 183: "thirties", 184: "forties", 185: "fifties", 186: "sixties", 187: "seventies",
    188: "eighties", 189: "nineties", 191: "tens", 192: "twenties", 193: "thirties", 194: "forties", 195: "fifties",
    196: "sixties", 197: "seventies", 198: "eighties", 199: "nineties", 201: "tens",
}  # fmt: skip
"""A decade's first three digits -> its word; the first decade of a century has no word of its own."""

PARTIES: dict[str, tuple[str, ...]] = {
    "Democratic": ("a Democratic", "a Democrat as", "a Democratic Party"),
    "Republican": ("a Republican", "a Republican as", "a Republican Party"),
}

OTHERS = (
    "a pirate", "a robot", "a cat", "a football coach", "a Roman emperor", "Shakespeare", "a wizard",
    "a weather forecaster",
    "a small child", "a chef", "a rap singer", "a film critic", "a physics professor", "a sea captain", "Darth Vader",
    "a shopkeeper", "a computer", "a fairy", "a doctor on call", "a poet of love",
)  # fmt: skip
"""People and things that are no president: the templates of names take them for text that fits no source."""

STRANGE = (
    "a recipe for tomato soup", "the best way to wash a dog", "a red bicycle on a beach", "how to install a printer",
    "purple elephants dancing", "a smiling face with glasses", "the offside rule in football", "asdf qwer zxcv",
    "a love song about the moon", "growing roses in a small garden", "the score of last night's game", "lorem ipsum",
    "a photograph of a mountain lake", "mix flour, eggs and sugar", "sort a list of numbers in Python", "xkcd foo bar",
    "my phone does not charge", "a story about a dragon", "the life cycle of frogs", "cheap flights to Rome",
    "a woman with long hair", "which shoes go with this dress", "the smell of fresh coffee", "a chess opening",
    "black holes and neutron stars", "a watercolor of a fox", "tuning a guitar", "hello there", "blah blah blah",
    "a bedtime story about bears", "how tall is a giraffe", "repairing a flat tire", "knitting a wool scarf",
    "the plot of a crime novel", "yoga for beginners", "a joke about two fish", "the periodic table", "zzz",
    "boiling an egg for six minutes", "a pixel art spaceship",
)  # fmt: skip
"""Text that fits no source."""

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "name": {
        "train": ("{}", "speak like {}", "a speech by {}", "in the style of {}"),
        "validation": ("sound like {}", "words that {} would use"),
        "test": ("write as {} did", "an adapter that talks like {}"),
    },
    "noun": {
        "train": ("a president of {}", "a speech from {}", "how presidents spoke in {}", "{}"),
        "validation": ("a statesman who governed in {}",),
        "test": ("an address to Congress during {}",),
    },
    "adjective": {
        "train": ("{} president", "a speech by {} president", "in the style of {} president"),
        "validation": ("sound like {} president", "{} leader's address"),
        "test": ("speak like {} president", "write as {} statesman would"),
    },
    "event": {
        "train": ("{}", "a speech about {}", "the president of {}"),
        "validation": ("the message to Congress on {}",),
        "test": ("talk to the nation about {}",),
    },
    "none": {"train": ("{}",), "validation": (), "test": ()},
}
"""Kind of wording -> part -> templates."""


def in_office(first: int, last: int, least: int = 1) -> tuple[str, ...]:
    """The sources that governed in at least `least` of the years `first` to `last`.

    The year of a change counts for who came."""
    found = {s: sum(max(0, min(b, last + 1) - max(a, first)) for a, b in f.terms) for s, f in FACTS.items()}
    return tuple(s for s, years in found.items() if years >= least)


def decades() -> list[Time]:
    """The decades in which sources governed: for two years at least, or else for any."""
    found = []
    for ten, word in DECADES.items():
        century = {18: "eighteen", 19: "nineteen", 20: "twenty"}[ten // 10]
        nouns = (f"the {ten}0s", f"the {century} {word}", f"the decade from {ten}0 to {ten}9")
        if in_office(ten * 10, ten * 10 + 9):
            found.append(Time(ten * 10, ten * 10 + 9, nouns, (f"an {ten}0s" if ten < 190 else f"a {ten}0s",)))
    return found


def part_of(i: int, count: int, group: int) -> str:
    """The part of wording `i` of `count` of the group with this number.

    The last of three or more is for test, the one before it for validation; the last of two for one of both, by turns.
    """
    if count == 2 and i == 1:
        return PARTS[1 + group % 2]
    return "train" if count < 3 else {count - 1: "test", count - 2: "validation"}.get(i, "train")


def phrases() -> list[Phrase]:
    """All sentences, each text once."""
    found: dict[str, Phrase] = {}

    def add(kind: str, templates: str, wordings: Sequence[tuple[str, str]], sources: tuple[str, ...]) -> None:
        for part, forms in TEMPLATES[templates].items():
            for form in forms:
                for wording, own in wordings:
                    held = {part, own} - {"train"}
                    # A template kept for one part with a wording kept for another would belong to neither.
                    if len(held) < 2:
                        text = form.format(wording)
                        found.setdefault(text, Phrase(text, sources, min(held, default="train"), kind))

    def split(words: tuple[str, ...], group: int) -> list[tuple[str, str]]:
        return [(w, part_of(i, len(words), group)) for i, w in enumerate(words)]

    for n, (source, facts) in enumerate(FACTS.items()):
        # Every name is learned: a nickname that was never seen cannot be guessed from the others.
        add("name", "name", [(w, "train") for w in facts.names], (source,))
        for k, event in enumerate(facts.events):
            add("event", "event", split(event, n + k), (source,))
    for kind, times in {"century": CENTURIES, "time": (*TIMES, *decades())}.items():
        for n, time in enumerate(times):
            sources = in_office(time.first, time.last, 2) or in_office(time.first, time.last)
            add(kind, "noun", split(time.nouns, n), sources)
            add(kind, "adjective", split(time.adjectives, n), sources)
    for n, (party, words) in enumerate(PARTIES.items()):
        members = tuple(s for s, f in FACTS.items() if f.party == party)
        add("party", "adjective", split(words, n), members)
        for time in CENTURIES:
            fits = tuple(s for s in members if s in in_office(time.first, time.last, 2))
            if fits:
                words = tuple(f"a {party} {a.split(' ', 1)[1]}" for a in time.adjectives)
                add("party", "adjective", split(words, n), fits)
    for texts, templates in ((OTHERS, "name"), (STRANGE, "none")):
        cycle = ("train", "train", "validation", "train", "test")
        add("none", templates, [(w, cycle[i % 5]) for i, w in enumerate(texts)], ())
    return list(found.values())


assert tuple(FACTS) == tuple(SOURCES)
