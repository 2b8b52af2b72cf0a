"""Build antonyms.jsonl and past_tense.jsonl from the WordNet 3.0 dict folder.

Usage: python build.py [DICT] [--out FOLDER]

DICT (default /usr/share/wordnet, from Debian's wordnet-base) must hold data.*,
verb.exc and cntlist.rev. The output is the same on every run.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

POS_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
SENSE_POS = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
WORD = re.compile(r"[a-z]+")

# ---------------------------------------------------------------- antonyms

MIN_COUNT = 5  # the rarer word of a pair must be tagged at least this often
NEGATIONS = ("un", "in", "im", "il", "ir", "dis", "non", "mis", "ab", "de")

# Pairs WordNet marks and that are tagged often enough, but that are odd, depend on a
# rare sense, take a word from a better pair, or only repeat a kept pair in another form.
DROP = """
other/same all/some lie/stand foot/head lie/sit keep/lose find/lose little/much no/some
all/no ever/never change/stay move/stay first/second rise/set fail/pass figure/ground
let/prevent break/make break/keep general/local ride/walk local/national old/young
allow/deny accept/refuse enjoy/suffer attend/miss have/miss gain/reduce common/individual
issue/recall avoid/confront full/thin natural/sharp gather/spread ignore/know fail/manage
concentration/distribution close/distant ahead/back active/quiet international/national
head/rear future/present advance/back stand/yield forget/mind flat/natural flat/sharp
preparation/resolution depart/stay out/safe dry/sweet conventional/nuclear delay/rush
neutral/positive negative/neutral bound/free extraordinary/ordinary location/studio
beginning/middle end/middle differ/equal confine/free following/leading early/middle
late/middle moving/still badly/well ill/well discharge/enlist away/home delicate/rugged
side/top capitalism/socialism separation/union anode/cathode analysis/synthesis back/veer
linger/rush analytic/synthetic intermediate/terminal green/ripe clarity/obscurity
decline/improvement badness/goodness general/particular complicate/simplify
advance/recede greater/lesser alternate/opposite numerical/verbal concentration/dilution
intelligence/stupidity acceptance/rejection deprive/enrich generalize/specify level/raise
anti/pro lean/rich gradual/steep complexity/simplicity guilt/innocence
obscurity/prominence loosen/stiffen differentiate/integrate bare/covered
admit/exclude admit/reject bounce/clear dull/lively gain/loss
failure/success beginning/end absence/presence strength/weakness northern/southern
danger/safety quickly/slowly generally/specifically heavily/lightly partly/wholly
loudly/softly eastern/western sleep/wake strengthen/weaken privately/publicly
happily/sadly narrow/widen fewer/more front/rear multiple/single foreign/native
nonspecific/specific easy/uneasy structured/unstructured charge/discharge
impersonal/personal directly/indirectly approval/disapproval like/unlike
appearance/disappearance continue/discontinue even/uneven ability/inability
agreement/disagreement past/present right/wrong dull/sharp common/uncommon
cash/credit bore/interest joint/separate reassure/worry king/queen disorder/order have/lack
actual/potential bend/straighten
"""

# Pairs WordNet marks whose tag counts are low, but that every speaker knows.
ADD = """
ample/meager beautiful/ugly careful/careless horizontal/vertical off/on profound/superficial
humble/proud noisy/quiet junior/senior inferior/superior permanently/temporarily
export/import attach/detach bold/timid calm/stormy explicit/implicit
inward/outward fair/foul figurative/literal feminine/masculine fancy/plain
spoken/written consonant/vowel generalist/specialist
downgrade/upgrade dissuade/persuade ascend/descend absorb/emit advance/retreat
brave/cowardly awkward/graceful indoor/outdoor coarse/fine
instrumental/vocal asset/liability irritate/soothe conform/deviate nasty/nice
fresh/stale abundant/scarce concave/convex
exterior/interior fertile/sterile harmful/harmless incoming/outgoing
defensive/offensive optimistic/pessimistic powerful/powerless frail/robust
profane/sacred sour/sweet tame/wild downstream/upstream valuable/worthless
accidentally/deliberately offshore/onshore accelerate/decelerate
overestimate/underestimate applaud/boo acquit/convict converge/diverge demote/promote
extinguish/ignite acidic/alkaline antonym/synonym creditor/debtor extrovert/introvert
hardware/software sunrise/sunset exhale/inhale relax/tense deflate/inflate
explode/implode decode/encode enter/exit download/upload prefix/suffix
plural/singular cooked/raw deductive/inductive generous/stingy counterfeit/genuine
automatic/manual maternal/paternal lowercase/uppercase obligatory/optional
retail/wholesale dystopia/utopia conductor/insulator
defendant/plaintiff farsighted/nearsighted aquatic/terrestrial
parallel/perpendicular covert/overt extrinsic/intrinsic
illegal/legal dishonest/honest correct/incorrect abnormal/normal imperfect/perfect
immoral/moral connect/disconnect distrust/trust disobey/obey illiterate/literate
"""

# ---------------------------------------------------------------- past tense

# Verbs with one usual simple past; each line is checked against verb.exc.
IRREGULAR = """
arise arose, awake awoke, bear bore, become became, begin began, bend bent, bind bound,
bite bit, bleed bled, blow blew, break broke, breed bred, bring brought, build built,
buy bought, catch caught, choose chose, cling clung, come came, creep crept, deal dealt,
dig dug, do did, draw drew, drink drank, drive drove, eat ate, fall fell, feed fed,
feel felt, fight fought, find found, flee fled, fling flung, fly flew, forbid forbade,
foresee foresaw, forget forgot, forgive forgave, freeze froze, get got, give gave, go went,
grind ground, grow grew, have had, hear heard, hide hid, hold held, keep kept, know knew,
lead led, leave left, lend lent, lose lost, make made, mean meant, meet met,
mislead misled, mistake mistook, misunderstand misunderstood, overcome overcame,
overhear overheard, oversee oversaw, overtake overtook, pay paid, rebuild rebuilt,
repay repaid, rewrite rewrote, ride rode, ring rang, rise rose, run ran, say said, see saw,
seek sought, sell sold, send sent, shake shook, shoot shot, shrink shrank, sing sang,
sink sank, sit sat, sleep slept, slide slid, speak spoke, spend spent, spin spun,
spring sprang, stand stood, steal stole, stick stuck, sting stung, stride strode,
strike struck, swear swore, sweep swept, swim swam, swing swung, take took, teach taught,
tear tore, tell told, think thought, throw threw, undergo underwent,
understand understood, undertake undertook, undo undid, uphold upheld, wear wore,
weep wept, win won, wind wound, withdraw withdrew, withhold withheld, withstand withstood,
write wrote
"""

# How many regular verbs of each spelling class, most frequent first.
REGULAR_QUOTA = {"ed": 64, "d": 52, "ied": 24, "doubled": 28}

# verb.exc lists only a participle or an archaic past for these; the past is regular.
REGULAR_ANYWAY = {"work", "show", "prove"}

# Past equals base, two usual pasts, spelling that differs between countries, or hardly
# ever a verb.
SKIP_VERBS = set(
    """
put let read set hit cut cost hurt spread cast burst split quit rid shed shut thrust bet
wed knit wet sweat upset broadcast forecast fit benefit travel cancel label level signal
model total fuel equal quarrel worship kidnap format combat stem pat
""".split()
)


def tag_counts(folder: Path) -> Counter[tuple[str, str]]:
    """How often each (word, part of speech) is tagged in WordNet's sense-tagged texts."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in (folder / "cntlist.rev").read_text("ascii").splitlines():
        sense, _, count = line.split()
        word, rest = sense.split("%")
        counts[word, SENSE_POS[rest[0]]] += int(count)
    return counts


def wordnet_antonyms(folder: Path, pos: str) -> set[tuple[str, str]]:
    """Alphabetically sorted pairs of plain words joined by a "!" pointer."""
    words: dict[str, list[str]] = {}
    links: list[tuple[str, str, str]] = []  # synset, other synset, word numbers
    for line in (folder / f"data.{POS_FILES[pos]}").read_text("ascii").splitlines():
        if line.startswith("  "):
            continue  # licence header
        fields = line.split(" | ")[0].split()
        end = 4 + 2 * int(fields[3], 16)
        words[fields[0]] = [re.sub(r"\(.*\)", "", w) for w in fields[4:end:2]]
        for i in range(end + 1, end + 1 + 4 * int(fields[end]), 4):
            if fields[i] == "!":
                links.append((fields[0], fields[i + 1], fields[i + 3]))
    pairs = set()
    for here, there, numbers in links:
        a = words[here][int(numbers[:2], 16) - 1]
        b = words[there][int(numbers[2:], 16) - 1]
        if WORD.fullmatch(a) and WORD.fullmatch(b):
            pairs.add((min(a, b), max(a, b)))
    return pairs


def parse_pairs(text: str) -> set[tuple[str, str]]:
    sides = [sorted(p.split("/")) for p in text.split()]
    pairs = [(a, b) for a, b in sides]
    assert len(pairs) == len(set(pairs)), "a pair is listed twice"
    return set(pairs)


def is_negation(a: str, b: str) -> bool:
    return any(a == p + b or b == p + a for p in NEGATIONS)


def build_antonyms(folder: Path, counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    ranked: dict[tuple[str, str], tuple[int, str]] = {}
    for pos in POS_FILES:
        for a, b in wordnet_antonyms(folder, pos):
            count = min(counts[a, pos], counts[b, pos])
            ranked[a, b] = max(ranked.get((a, b), (-1, "")), (count, pos))
    drop, add = parse_pairs(DROP), parse_pairs(ADD)
    assert drop | add <= ranked.keys(), sorted((drop | add) - ranked.keys())

    chosen: list[tuple[str, str]] = []
    used: set[str] = set()
    for pair in sorted(ranked, key=lambda p: (-ranked[p][0], p)):
        count, pos = ranked[pair]
        if pair not in add and (count < MIN_COUNT or pair in drop):
            continue
        if used & set(pair):
            assert pair not in add, pair
            continue  # each word is in one pair only: the more frequent one
        used |= set(pair)
        a, b = pair  # the more frequent word is the input
        chosen.append((b, a) if counts[b, pos] > counts[a, pos] else (a, b))
    return chosen


def regular_past(verb: str, listed: set[str]) -> tuple[str, str]:
    """Spelling class and past; doubling is taken from verb.exc."""
    doubled = verb + verb[-1] + "ed"
    if doubled in listed:
        return "doubled", doubled
    if verb.endswith("e"):
        return "d", verb + "d"
    if re.search(r"[^aeiou]y$", verb):
        return "ied", verb[:-1] + "ied"
    return "ed", verb + "ed"


def build_past(folder: Path, counts: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    listed: dict[str, set[str]] = {}  # base -> irregular forms, participles included
    for line in (folder / "verb.exc").read_text("ascii").splitlines():
        form, *bases = line.split()
        for base in bases:
            listed.setdefault(base, set()).add(form)
    words = IRREGULAR.replace(",", " ").split()
    irregular = list(zip(words[::2], words[1::2], strict=True))
    for verb, past in irregular:
        assert past in listed[verb] - {verb}, (verb, past)

    all_forms = set().union(*listed.values())
    regular, left = [], dict(REGULAR_QUOTA)
    verbs = [w for w, pos in counts if pos == "v" and WORD.fullmatch(w)]
    for verb in sorted(verbs, key=lambda v: (-counts[v, "v"], v)):
        forms = {f for f in listed.get(verb, set()) if not f.endswith("ing")}
        kind, past = regular_past(verb, forms)
        if verb in SKIP_VERBS or verb in all_forms or verb in dict(irregular):
            continue
        if not forms <= {past} and verb not in REGULAR_ANYWAY:
            continue  # some irregular form: not plainly regular
        if left[kind]:
            left[kind] -= 1
            regular.append((verb, past))
    return sorted(irregular + regular, key=lambda p: (-counts[p[0], "v"], p))


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    assert 240 <= len(pairs) <= 320
    assert len({a for a, _ in pairs}) == len(pairs)
    assert all(WORD.fullmatch(a) and WORD.fullmatch(b) and a != b for a, b in pairs)
    lines = [json.dumps({"input": a, "output": b}) for a, b in pairs]
    path.write_text("\n".join(lines) + "\n", "ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wordnet", type=Path, nargs="?", default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    counts = tag_counts(args.wordnet)
    antonyms = build_antonyms(args.wordnet, counts)
    past = build_past(args.wordnet, counts)
    negations = sum(is_negation(a, b) for a, b in antonyms)
    assert 4 * negations <= len(antonyms)
    write(args.out / "antonyms.jsonl", antonyms)
    write(args.out / "past_tense.jsonl", past)
    print(f"antonyms: {len(antonyms)} pairs, {negations} of them prefix negations")
    print(f"past_tense: {len(past)} pairs, {len(IRREGULAR.split(','))} of them irregular")


if __name__ == "__main__":
    main()
