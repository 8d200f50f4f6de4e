"""Documents to chunks that fit the encoder, and passages to sentences worth quoting.

`split` reads the structure of Markdown, breaks what is too long into ever finer pieces (block, sentence, line, a run
of tokens) and then chooses where to cut: each place has a price, each chunk pays for the room that it leaves empty,
and the cheapest set of cuts wins. So chunks come out even and tails join their neighbours, without special cases.
"""

import itertools
import math
import re
import textwrap
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from app.domain import Chunk

CHUNKER_VERSION = 1
"""Names how documents are cut; raised with `split`, it makes services refuse collections written before."""

Span: TypeAlias = tuple[int, int]


class Tokenizer(Protocol):
    """How the encoder reads text."""

    def offsets(self, text: str) -> Sequence[Span]:
        """Where each token stands, in characters: no special tokens, nothing truncated."""


# --- Blocks of Markdown ----------------------------------------------------------------------------------------------

Kind: TypeAlias = Literal[
    "heading", "rule", "fence", "indented", "table", "quote", "list", "item", "text", "sentence", "line", "slice"
]
MARKER = r"(?: \\?[-*+•] | \d{1,9}\\?[.)] )"  # escaped ones stand in what was converted from HTML
FENCE = r"[ \t]* (?:`{3}|~{3})"
# What ends a paragraph without a blank line. A list that does must start with 1, as a wrapped line may with a year.
INTERRUPTION = (
    rf"(?: [^\S\n]*$ | [ ]{{0,3}}\#{{1,6}}[ ] | {FENCE} | [ ]{{0,3}}[>|] | [ \t]*(?:\\?[-*+•]|1\\?[.)])[ \t] )"
)
BLOCK = re.compile(
    rf"""^(?:
      (?P<fence>    [ \t]* (?P<mark>`{{3,}}(?=[^`\n]*$) | ~{{3,}}) .*
                    (?: (?:\n.*)*? \n[ \t]* (?P=mark) [`~]* [ \t]*$ | (?:\n.*)* ) )
    | (?P<heading>  [ ]{{0,3}}\#{{1,6}} (?:[ \t].*)? $
                  | [ ]{{0,3}}[^\s\#>|].{{0,99}} \n[ ]{{0,3}} (?:=+|-{{2,}}) [ \t]*$ )
    | (?P<rule>     [ ]{{0,3}} (?: (?:-[ \t]*){{3,}} | (?:\*[ \t]*){{3,}} | (?:_[ \t]*){{3,}} ) $ )
    | (?P<table>    [ \t]*\| .* (?: \n[ \t]*\| .* )* )
    | (?P<quote>    [ ]{{0,3}}> .* (?: \n[ ]{{0,3}}> .* )* )
    | (?P<item>     [ \t]*{MARKER} (?:[ \t].*)? $ (?: \n(?! {INTERRUPTION} | [ \t]*{MARKER}[ \t] ) .+ )* )
    | (?P<indented> (?:[ ]{{4}}|\t) .* (?: (?:\n[ \t]*$)* \n(?:[ ]{{4}}|\t)[ \t]*\S.* )* )
    | (?P<text>     .+ (?: \n(?! {INTERRUPTION} ) .+ )* )
    )""",
    re.MULTILINE | re.VERBOSE,
)
PLAIN_WORDS = r"(?:\b[A-Za-z][a-z'’]{0,20}[,;:]?[ \n]+){5}"
PROSE_LINE = re.compile(rf"(?!\s*[#%$>~/]|.*[={{}}\\]).*?{PLAIN_WORDS}")
PROSE = re.compile(PLAIN_WORDS)
SYNTAX = re.compile(r"[={}\\]|\(\)|^[ \t]*[#$%>~/]|;$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A run of text, `text[start:end]`. A list has its items as `parts`."""

    kind: Kind
    start: int
    end: int
    parts: tuple["Block", ...] = ()


def _blocks(text: str) -> Iterator[Block]:
    """Read Markdown as a row of blocks, items of lists one by one."""
    for match in BLOCK.finditer(text):
        kind: Kind = match.lastgroup  # type: ignore[assignment]
        if kind == "indented" and PROSE_LINE.match(match[0]):
            kind = "text"  # an admonition or a paragraph of a list
        if not match[0].isspace():
            yield Block(kind, *match.span())


def _with_lists(text: str) -> Iterator[Block]:
    """Read Markdown as a row of blocks, an item with its neighbours and what is indented under them as one list."""
    items: list[Block] = []
    for block in _blocks(text):
        if block.kind == "item" or (items and block.kind in ("text", "indented") and text[block.start].isspace()):
            items.append(block)
            if len(items) == MAX_PIECES_AT_ONCE:
                yield from _list(items)
                items = []
            continue
        yield from _list(items)
        items = []
        yield block
    yield from _list(items)


def _list(items: list[Block]) -> Iterator[Block]:
    if items:
        yield Block("list", items[0].start, items[-1].end, tuple(items))


# --- Splitting a document --------------------------------------------------------------------------------------------

# What a cut costs before a piece of this kind. A chunk pays for its empty room too: 0.25 where half of it is empty.
PRICES: Mapping[Kind, float] = {
    "heading": 0.0,
    "text": 0.05,
    "quote": 0.05,
    "list": 0.1,
    "fence": 0.1,
    "indented": 0.1,
    "table": 0.1,
    "item": 0.15,
    "sentence": 0.25,
    "line": 0.3,
    "slice": 0.6,
    "rule": 1.0,
}
PRICE_AFTER_HEADING = 3.0
PRICE_AFTER_COLON = 0.4  # "like this:" belongs to what follows
PRICE_AFTER_BLANK_LINE = 0.15  # in code
PRICE_OF_INDENT = 0.4  # before a line of code that stands deeper than the one above it
PRICE_BESIDE_FENCE = 2.0  # between the fence and its first or last line of code
PRICE_OF_TAIL = 0.5  # of a chunk under a quarter of the limit
# What no cut costs before a heading deeper than the one before it, as deep, less deep.
PRICE_OF_CHILD, PRICE_OF_SIBLING, PRICE_OF_STRANGER = 0.4, 0.6, 1.2
PRICE_OF_PART = 0.4  # on top of that where the section then goes on in the next chunk

MAX_TOKEN_CHARACTERS = 16
"""A token counts once for each so many characters: a word that the encoder does not know may be a page long."""
MAX_CHARACTERS_AT_ONCE = 2**16
MAX_PIECES_AT_ONCE = 20_000
"""Far more than most documents have: what is held of a longer one does not grow with it."""
SPACE_BEFORE_WORD = re.compile(r"\s(?=\S)")
MAX_HEADING_CHARACTERS = 100
INLINE_MARKUP = re.compile(r"\*+|`+|!?\[([^\]\n]*)\]\([^)\n]*\)|\{#[^}\n]*\}$")
FENCE_LINE = re.compile(FENCE, re.VERBOSE)
LINE = re.compile(r".+")

Path: TypeAlias = tuple[tuple[int, str], ...]
"""The sections that something stands in, outermost first: level and title."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is not cut any further. `cut` is the price of a cut before it, `no_cut` of none."""

    start: int
    end: int
    path: Path
    cut: float
    no_cut: float = 0.0


@dataclass(frozen=True, slots=True)
class Ruler:
    """Measures any run of the document in tokens; `limit` of them make a chunk."""

    starts: Sequence[int]
    limit: int

    def count(self, start: int, end: int) -> int:
        """Count the tokens that start in a run."""
        return bisect_left(self.starts, end) - bisect_left(self.starts, start)

    def fits(self, start: int, end: int) -> bool:
        """Tell whether a run is short enough for a chunk."""
        return self.count(start, end) <= self.limit


def split(document_text: str, tokenizer: Tokenizer, *, max_tokens: int) -> list[Chunk]:
    """Cut a document into chunks of at most `max_tokens`, each with the section that it stands in.

    Chunks are slices of the text, in order, without overlap; only white space is left out.
    """
    ruler = Ruler(_token_starts(document_text, tokenizer), max_tokens)
    chunks: list[Chunk] = []
    for members in _joined(_pieces(document_text, ruler), ruler):
        heading = _heading_of(members)
        seams = [piece.start for piece in members[1:]]
        for start, end in _verified(document_text, members[0].start, members[-1].end, seams, tokenizer, max_tokens):
            chunks.append(Chunk(len(chunks), document_text[start:end], start, end, heading))
    return chunks


def _token_starts(text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """Say where tokens start, reading some of the text at a time: a tokenizer takes 200 bytes for each character."""
    starts = array("q")
    begin = 0
    while begin < len(text):
        limit = begin + MAX_CHARACTERS_AT_ONCE
        # Between words, where the tokens are the same as in one go; a word longer than all this is cut.
        space = SPACE_BEFORE_WORD.search(text, limit, limit + MAX_CHARACTERS_AT_ONCE)
        end = space.start() if space else limit
        for start, stop in tokenizer.offsets(text[begin:end]):
            starts.extend(range(begin + start, begin + max(stop, start + 1), MAX_TOKEN_CHARACTERS))
        begin = end
    return starts


def _pieces(text: str, ruler: Ruler) -> Iterator[Piece]:
    """Break a document into pieces that fit, and price the places between them."""
    path: Path = ()
    lead = 0  # where that starts which announces the block
    previous: Block | None = None
    for block in _with_lists(text):
        cut, no_cut = _price(text, previous, block), 0.0
        if previous is None or not _announces(text, previous, block):
            lead = block.start
        if block.kind == "heading":
            outer, path = path, _enter(path, text[block.start : block.end])
            no_cut = _price_of_mixing(outer, path) if lead == block.start else 0.0
        for start, end, inner_cut in _broken(text, block, cut, lead, ruler):
            yield Piece(start, end, path, inner_cut, no_cut)
            no_cut = 0.0
        previous = block


def _announces(text: str, previous: Block, block: Block) -> bool:
    """Tell whether a block fits only if what stands before it fits too: its headings, or "like this:" above a list."""
    return previous.kind == "heading" or (block.kind == "list" and _ends_with_colon(text, previous))


def _ends_with_colon(text: str, block: Block) -> bool:
    return text[block.start : block.end].rstrip().endswith(":")


def _price(text: str, previous: Block | None, block: Block) -> float:
    """Price a cut between two blocks."""
    if previous is None:
        return 0.0
    if previous.kind == "heading":
        return PRICE_AFTER_HEADING
    if block.kind not in ("heading", "text") and _ends_with_colon(text, previous):
        return max(PRICE_AFTER_COLON, PRICES[block.kind])
    return PRICES[block.kind]


def _enter(path: Path, heading: str) -> Path:
    """Go from one section to the one under `heading`."""
    first, *underline = heading.strip().splitlines()
    marks = len(first) - len(first.lstrip("#"))
    level = marks or (1 if underline[-1].strip().startswith("=") else 2)
    title = " ".join(INLINE_MARKUP.sub(r"\1", first[: 3 * MAX_HEADING_CHARACTERS].strip("# \t")).split())
    return (*(section for section in path if section[0] < level), (level, title[:MAX_HEADING_CHARACTERS]))


def _price_of_mixing(outer: Path, inner: Path) -> float:
    """Price a chunk that goes on from one section into the next."""
    if not outer:
        return PRICE_OF_CHILD
    before, after = outer[-1][0], inner[-1][0]
    return PRICE_OF_CHILD if after > before else PRICE_OF_SIBLING if after == before else PRICE_OF_STRANGER


def _heading_of(pieces: Sequence[Piece]) -> str:
    """Name the section that all pieces stand in, and the one around it."""
    first, last = pieces[0].path, pieces[-1].path
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return " > ".join([title for (_, title), _ in common if title][-2:])


def _broken(text: str, block: Block, cut: float, lead: int, ruler: Ruler) -> Iterator[tuple[int, int, float]]:
    """Break a block until each piece fits, the first one together with what announces it, from `lead` on."""
    # Rather part a sentence from its heading than cut it.
    small = block.kind in ("sentence", "line") and ruler.fits(block.start, block.end)
    if small or block.kind == "slice" or ruler.fits(lead, block.end):
        yield block.start, block.end, cut
        return
    previous: Block | None = None
    for part in _parts(text, block, ruler):
        if previous is not None:
            cut, lead = _price_inside(text, block, previous, part), part.start
        yield from _broken(text, part, cut, lead, ruler)
        previous = part


def _parts(text: str, block: Block, ruler: Ruler) -> Iterable[Block]:
    """Take a block apart into the next finer kind."""
    span = block.start, block.end
    match block.kind:
        case "list":
            return block.parts
        case "item" | "text" | "quote":
            return (Block("sentence", *sentence) for sentence in _sentence_spans(text, *span))
        case "line":
            return (Block("slice", *slice) for slice in _slices(text, *span, ruler))
        case _:
            return (Block("line", *line.span()) for line in LINE.finditer(text, *span) if not line[0].isspace())


def _price_inside(text: str, block: Block, previous: Block, part: Block) -> float:
    """Price a cut between two parts of a block."""
    if block.kind == "fence" and (FENCE_LINE.match(text, previous.start) or FENCE_LINE.match(text, part.start)):
        return PRICE_BESIDE_FENCE
    if part.kind == "line":
        if "\n\n" in text[previous.end : part.start]:
            return PRICE_AFTER_BLANK_LINE
        deeper = _indent(text, part.start) > _indent(text, previous.start)
        return PRICE_OF_INDENT if deeper else PRICES["line"]
    if block.kind == "list" and part.kind != "item":
        return PRICES["sentence"]
    return PRICES[part.kind]


def _indent(text: str, line_start: int) -> int:
    return _skip_space(text, line_start) - line_start


def _slices(text: str, start: int, end: int, ruler: Ruler) -> Iterator[Span]:
    """Cut evenly between tokens, and between words where there are any: the last resort."""
    while not ruler.fits(start, end):
        count = ruler.count(start, end)
        share = math.ceil(count / math.ceil(count / ruler.limit))
        cut = max(ruler.starts[bisect_left(ruler.starts, start) + share], start + 1)
        half = (start + cut) // 2
        cut = max(text.rfind(" ", half, cut), text.rfind("\t", half, cut), cut - 1) + 1
        yield start, cut
        start = cut
    yield start, end


def _joined(pieces: Iterable[Piece], ruler: Ruler) -> Iterator[list[Piece]]:
    """Join pieces to chunks. Of a very long document some pieces at a time: far behind a cut, nothing depends on it."""
    held: list[Piece] = []
    for piece in pieces:
        held.append(piece)
        if len(held) == MAX_PIECES_AT_ONCE:
            cuts = _cheapest_cuts(held, ruler)
            settled = cuts[: len(cuts) * 9 // 10 + 1]
            yield from (held[first:last] for first, last in itertools.pairwise(settled))
            held = held[settled[-1] :]
    yield from (held[first:last] for first, last in itertools.pairwise(_cheapest_cuts(held, ruler)))


def _cheapest_cuts(pieces: Sequence[Piece], ruler: Ruler) -> list[int]:
    """Choose where to cut: the indices of the pieces that start a chunk, and the end.

    `costs[i]` is what the pieces before i cost at best; a chunk takes as many pieces as fit.
    """
    firsts = [bisect_left(ruler.starts, piece.start) for piece in pieces]
    ends = [bisect_left(ruler.starts, piece.end) for piece in pieces]
    mixed = list(itertools.accumulate(piece.no_cut for piece in pieces))
    costs = [0.0]
    origins = [0]
    for last, end in enumerate(ends):
        best, origin = math.inf, last
        goes_on = last + 1 < len(pieces) and pieces[last + 1].path == pieces[last].path
        for first in range(last, -1, -1):
            fill = (end - firsts[first]) / ruler.limit
            # Some pieces have no token at all.
            if (fill > 1 and first < last) or last - first > 2 * ruler.limit:
                break
            mixing = mixed[last] - mixed[first]
            cost = costs[first] + pieces[first].cut + mixing + (1 - fill) ** 2
            cost += PRICE_OF_TAIL * (fill < 0.25) + PRICE_OF_PART * (goes_on and mixing > 0)
            if cost < best:
                best, origin = cost, first
        costs.append(best)
        origins.append(origin)
    cuts = [len(pieces)]
    while cuts[-1] > 0:
        cuts.append(origins[cuts[-1]])
    return cuts[::-1]


def _verified(
    text: str, start: int, end: int, seams: Sequence[int], tokenizer: Tokenizer, max_tokens: int
) -> Iterator[Span]:
    """Measure a chunk by itself, as the encoder will, and halve it where it is too long after all.

    Byte-pair tokenizers read the start of a text in another way than its middle.
    """
    end = start + len(text[start:end].rstrip())
    offsets = tokenizer.offsets(text[start:end])
    places = [place for place in seams if start < place < end] or [start + first for first, _ in offsets if first > 0]
    if len(offsets) <= max_tokens or not places:
        yield start, end
        return
    middle = (start + end) // 2
    cut = min(places, key=lambda place: abs(place - middle))
    yield from _verified(text, start, cut, seams, tokenizer, max_tokens)
    yield from _verified(text, cut, end, seams, tokenizer, max_tokens)


# --- Sentences -------------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the last word of a sentence; by case, as "200 ms" may be one.
ABBREVIATIONS = _words(
    "e.g E.g i.e I.e eg ie vs cf Cf viz approx Approx ca Mr Mrs Ms Dr Prof Messrs fig Fig figs Figs eq Eq eqs Eqs"
)
# Such before a number only: "No. 5", but "I said no."
NUMBERED = _words("no nos art p pp jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun")
# The last word only where the next one looks like a first one, as with initials and dotted letters (U.S., p.m.).
AMBIGUOUS = _words(
    "etc al inc ltd co corp jr sr bros ave blvd rd st mt ft gen col lt sgt capt rev hon gov sen rep pres sec ch vol "
    "vols ed eds dept univ est"
)
STARTERS = _words(
    "a all although an and another are as at because both but by can did do does during each every for from has have "
    "he her here his how however i if in is it its many more most my no not on one or our she since so some such that "
    "the their then there these they this those though to two under until was we were what when where which while who "
    "why with you your"
)
END = re.compile(
    r"""(?<![.!?…]) (?P<stop> [.!?…]++ ) ["'”’»)\]}*_`]*+ (?:\[\d+\])* (?=\s) | (?P<wide> [。！？]+ ) [」』”）]*""",
    re.VERBOSE,
)
LAST_WORD = re.compile(r"[^\s()\[\]\"'“”‘’*_/—–-]*$")
NEXT_WORD = re.compile(r"[\s\"'“‘«(\[{*_>]*([\w’']*\.?)")
INITIAL = re.compile(r"[A-Za-z]$ | (?:[A-Za-z]{1,2}\.)+ [A-Za-z]{1,2}$", re.VERBOSE)
# A word that is more than a number's name: "Step 1. Install it" is one sentence, and so is "Q. Why?"
SUBSTANCE = re.compile(r"(?<![^\W_])(?!(?:Chapter|Figure|Lesson|Part|Question|Section|Step|Table)\b)[^\W\d_]{2}")
MIN_TRAILING_OFF = 15  # characters: "So... I tried" is one sentence
FENCES = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE)
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n)[\s\S]){1,1000}?(?<!`)\1(?!`)")
QUOTE_MARKS = re.compile(r"^(?:[ ]{0,3}>[ \t]?)+", re.MULTILINE)
ITEM_MARK = re.compile(rf"[ \t]*{MARKER}[ \t]* (?:\[[ xX]\][ ])?", re.VERBOSE)
WORD = re.compile(r"\w")


def sentences(text: str) -> list[str]:
    """List the sentences of a passage: headings are none, an item has its own, a block of code or a row is one."""
    code_end = _code_end(text)
    found = [text[:code_end]] if code_end else []
    rest = text[code_end:]
    for block in _blocks(rest):
        found += _sentences_of(rest[block.start : block.end], block.kind)
    return [sentence for sentence in found if WORD.search(sentence)]


def _sentences_of(text: str, kind: Kind) -> Iterable[str]:
    match kind:
        case "heading" | "rule":
            return []
        case "fence" | "indented":
            return [textwrap.dedent(text).strip()]
        case "table":
            return [" | ".join(cell.strip() for cell in row.strip().strip("|").split("|")) for row in text.splitlines()]
        case "quote":
            return sentences(QUOTE_MARKS.sub("", text))
        case "text" if "\n" in text and SYNTAX.search(text) and not PROSE.search(text):
            return [text.strip()]  # code without a fence, or the middle of what has one
        case _:
            prose = ITEM_MARK.sub("", text, count=1) if kind == "item" else text
            return [" ".join(prose[start:end].split()) for start, end in _sentence_spans(prose, 0, len(prose))]


def _sentence_spans(text: str, start: int, end: int) -> Iterator[Span]:
    """Find the sentences of a paragraph."""
    # No sentence ends inside code; and what follows code is as good as a capital letter.
    prose = INLINE_CODE.sub(lambda code: "X" * len(code[0]), text[start:end])
    first = _skip_space(prose, 0)
    substance = SUBSTANCE.search(prose)
    for stop in END.finditer(prose):
        if substance and substance.start() < stop.start() and _ends_sentence(prose, first, stop):
            yield start + first, start + stop.end()
            first = _skip_space(prose, stop.end())
            substance = SUBSTANCE.search(prose, first)
    last = len(prose.rstrip())
    if first < last:
        yield start + first, start + last


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _ends_sentence(prose: str, start: int, stop: re.Match[str]) -> bool:
    """Tell whether a full stop, or the like, is the end of a sentence."""
    if stop["wide"] or (stop["stop"] == "." and prose[stop.start() - 1].isspace()):
        return True
    word = LAST_WORD.findall(prose, max(0, stop.start() - 20), stop.start())[0]
    following = NEXT_WORD.findall(prose, stop.end(), stop.end() + 40)[0]
    if following[:1].islower() or word in ABBREVIATIONS:
        return False
    if stop["stop"] != ".":
        return stop["stop"][0] in "!?" or stop.start() - start > MIN_TRAILING_OFF
    if word.lower() in NUMBERED:
        return not following[:1].isdigit()
    if word.lower() in AMBIGUOUS or INITIAL.match(word):
        return following.lower() in STARTERS
    return True


def _code_end(text: str) -> int:
    """Find the end of code that began before the passage: a bare fence closes what nothing opened."""
    fence = FENCES.search(text)
    if fence is None or fence["info"].strip():
        return 0
    rest = text[fence.end() :]
    if _is_balanced(text) and not _is_balanced(rest):
        return 0
    above = text[: fence.start()].removesuffix("\n").rpartition("\n")[2].strip()
    below = rest[1:].partition("\n")[0].strip()
    # It opens code if it stands under a blank line or a colon, or between prose and code.
    if not above or above.endswith(":") or (below and PROSE.search(f"{above} ")):
        return 0
    return fence.end()


def _is_balanced(text: str) -> bool:
    """Tell whether each fence that opens is closed."""
    opened = ""
    for mark, info in FENCES.findall(text):
        if not opened:
            opened = mark
        elif mark.startswith(opened) and not info.strip():
            opened = ""
    return not opened
