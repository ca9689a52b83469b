"""Log probabilities of a prompt in the events of its choice: they join the text that is echoed."""

from baton.node.messages.control import Logprob, PromptLogprob, SamplingSpec
from baton.proxy.http.assembler import Assembler
from baton.proxy.http.events import ChoiceEnd, Content, PromptRanks
from baton.proxy.http.prompt_scores import ScoreRule
from baton.proxy.http.schema import IdRule, StopRule
from baton.proxy.interface import Delta, Generation


def test_echoed_tokens_join_the_text_with_what_follows(text):
    """Guards against offsets without the prompt, and a chunk before all entries of the prompt have come."""
    prompt = "Once upon a time"
    ids = text.encode(prompt, add_special_tokens=False)
    answer = text.encode(" there", add_special_tokens=False)
    sampling = SamplingSpec(max_tokens=len(answer), prompt_logprobs=1, logprobs=True)
    generation = Generation(request_id="r", model="m", prompt_ids=ids, sampling=sampling)
    assembler = Assembler(generation, prompt, text, StopRule((), False), IdRule(False, False), scores=ScoreRule(1, 1))
    entries = tuple(PromptLogprob(-1.0 - place, 3, ((5, -0.5),)) for place in range(len(ids) - 1))
    assert assembler.feed(Delta((), prompt_logprobs=entries[:1])) == []
    events = assembler.feed(Delta((), prompt_logprobs=entries[1:]))
    ranks, content = events
    assert isinstance(ranks, PromptRanks) and isinstance(content, Content)
    assert content.text == prompt and [each.logprob for each in content.logprobs] == [
        None,
        *(e.logprob for e in entries),
    ]
    assert ranks.entries[0] is None and ranks.entries[1][ids[1]].rank == 3 and ranks.entries[1][5].rank == 1
    events = assembler.feed(Delta(answer, tuple(Logprob(-2.0) for _ in answer), "length"))
    shown = [*content.logprobs, *events[0].logprobs]
    whole = content.text + events[0].text
    assert b"".join(each.token for each in shown).decode() == whole == prompt + " there"
    assert [each.offset_chars for each in shown] == [
        len(b"".join(e.token for e in shown[:i])) for i in range(len(shown))
    ]
    assert isinstance(events[1], ChoiceEnd)
