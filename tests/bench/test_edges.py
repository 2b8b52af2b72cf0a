"""The pairs that edges are measured on."""

from bench.edges import pairs


def test_pairs(smollm2):
    """As many tokens in prompt and source, which differ in one; answers of one token each."""
    found = pairs(20)
    assert len({prompt for prompt, *_ in found}) == 20
    for prompt, source, *answers in found:
        one, other = smollm2.encode(prompt), smollm2.encode(source)
        assert 15 <= len(one) == len(other) <= 20
        assert (one != other).sum() == 1
        assert [len(smollm2.encode(answer)) for answer in answers] == [1, 1]
        assert not prompt.endswith(tuple(answers))
