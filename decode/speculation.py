"""Drafts of a decode worker's sequences: how many the next step may verify, and what became of those of the last.

Where the drafts come from is the runner's matter; this knows how many, from which answers, and counts.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.models.batch import Drawn
from baton.models.drafts import MOST_ANSWER_TOKENS
from baton.node.counters import DecodeCounters
from baton.worker.draft_counts import DraftCounts
from baton.worker.past_answers import PastAnswers
from baton.worker.sequence import Sequence


class Speculation:
    """`most_drafts`: that a step verifies for one sequence, 0 for none; `draft_reach`: places behind them that
    proposing writes."""

    def __init__(self, most_drafts: int, draft_reach: int, max_model_len: int, counters: DecodeCounters) -> None:
        self._most_drafts, self._draft_reach = most_drafts, draft_reach
        self._max_model_len = max_model_len
        self._counters = counters
        self._counts = DraftCounts()
        self._past_answers = PastAnswers(MOST_ANSWER_TOKENS)

    def begin(self, sequence: Sequence) -> None:
        """It begins to run: what followed similar prompts may be drafted."""
        if self._most_drafts and sequence.speculates:
            sequence.past_answers = self._past_answers.similar(sequence.table.names(sequence.prompt_len))

    def finish(self, sequence: Sequence) -> None:
        """Its answer is complete, and may be drafted where a prompt begins alike."""
        if self._most_drafts:
            answer = sequence.token_ids[sequence.prompt_len :]
            self._past_answers.add(sequence.table.names(sequence.prompt_len), answer)

    def drafts(self, sequence: Sequence) -> tuple[int, int, int]:
        """Drafts in flight of a sequence, those that may follow its next token, and how far proposing reaches behind
        them: none past its last token. Once a step."""
        if not self._most_drafts:
            return 0, 0, 0
        longest = min(self._max_model_len, sequence.prompt_len + sequence.sampling.max_tokens)
        in_flight = max(0, min(sequence.num_drafting, longest - 1 - sequence.num_launched))
        allowed = sequence.speculates and (sequence.draft_record.allows() or sequence.has_forced)
        left = max(0, longest - 1 - sequence.num_expected - in_flight)
        most = min(self._most_drafts, left)
        return in_flight, most * allowed, min(self._draft_reach, left - most)

    def verified(self, sequence: Sequence, drawn: Drawn, num_appended: int) -> None:
        """A step has verified drafts of the sequence, to which `num_appended` drawn tokens were appended."""
        num_accepted = len(drawn.token_ids) - 1
        if drawn.source == "prediction":
            sequence.num_predicted += min(num_accepted, num_appended)
        if drawn.source != "grammar":  # says nothing of other drafts
            sequence.draft_record.verified(drawn.num_drafts, num_accepted)
        self._counters.spec_decode_num_drafts += 1
        self._counters.spec_decode_num_draft_tokens += drawn.num_drafts
        self._counters.spec_decode_num_accepted_tokens += num_accepted
        self._counts.verified(num_accepted, drawn.source)

    def report(self, running: Iterable[Sequence]) -> None:
        """Bring the counters by source and by place up to date."""
        self._counts.fill(self._counters)
        self._counters.spec_decode_cooled_sequences = sum(each.draft_record.is_cooled for each in running)
