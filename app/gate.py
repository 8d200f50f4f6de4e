"""The gate: a small model's text goes in, and only sentences that the passages support come out, with their markers."""

from collections.abc import Sequence

from app.chunking import sentences
from app.citations import find_citations, without_markers
from app.domain import Grounded, Passage
from app.grounding import Evidence, choose_quotes, quote, rank_evidence, supporting_evidence

MAX_SENTENCES = 2
"""What the model is asked for; what it adds after that is rambling, so generation stops there."""


class Gate:
    """Checks a stream of text sentence by sentence against the presented passages.

    A sentence is released if one of the best sentences of the passages says the same; the others are replaced by
    those best sentences, quoted. So the answer always rests on the best evidence.
    """

    def __init__(self, question: str, passages: Sequence[Passage]) -> None:
        self._question = question
        self._num_presented = len(passages)
        self._quotes = choose_quotes(rank_evidence(question, passages))
        self._support: list[Evidence] = []
        self._text = ""
        self._num_checked = 0
        self._has_output = False
        self._has_quotes = False
        self.unsupported: list[str] = []

    @property
    def is_full(self) -> bool:
        """The model has said all that it was asked for."""
        return self._num_checked >= MAX_SENTENCES

    def feed(self, text: str) -> str:
        """Take the next piece of the model's text, give back what it completes and the passages support."""
        self._text += text
        # The last sentence may go on; the others are whole.
        return self._check(sentences(without_markers(self._text))[:-1])

    def finish(self, *, is_whole: bool = True) -> str:
        """End the model's text; give back its last sentence if supported, and quotes in place of what was not.

        Of a text that is not whole the last sentence is dropped: it may be cut in the middle.
        """
        last = self._check(sentences(without_markers(self._text))) if is_whole else ""
        missing = [evidence for evidence in self._quotes if evidence not in self._support]
        if self._support and not self.unsupported and self._quotes[0] in self._support:
            missing = []
        self._has_quotes = bool(missing)
        return last + "".join(self._separated(quote(evidence)) for evidence in missing)

    @property
    def num_removed_markers(self) -> int:
        """Count the model's markers that name no presented passage; the others gave way to the gate's own."""
        return sum(not 1 <= citation.n <= self._num_presented for citation in find_citations(self._text))

    @property
    def grounded(self) -> Grounded:
        """How the answer came about, once finished."""
        if not self._support:
            return "quotes"
        return "mixed" if self._has_quotes else "model"

    def _check(self, complete: Sequence[str]) -> str:
        released = ""
        for sentence in complete[self._num_checked : MAX_SENTENCES]:
            self._num_checked += 1
            support = supporting_evidence(sentence, self._question, self._quotes)
            if support is None:
                self.unsupported.append(sentence)
            elif support not in self._support:
                self._support.append(support)
                released += self._separated(f"{sentence} [{support.n}]")
        return released

    def _separated(self, text: str) -> str:
        separator = " " if self._has_output else ""
        self._has_output = True
        return separator + text
