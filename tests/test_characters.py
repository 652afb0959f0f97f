"""Words as characters: codes written by hand, and the character network against plain loops over bytes and units."""
import math

import pytest
import torch
from conftest import SENTENCES, tiny
from torch.testing import assert_close

from data.characters import CharacterCNN, character_codes
from ELMO import ELMo

LONGEST_PART = 24       # bytes of a word that the network reads
LENGTH = 26             # codes of a word: its bytes, a begin and an end
Weights = dict[str, list]


def test_codes_of_words_are_those_written_by_hand():
    codes = character_codes(["ab", "é", ""])
    assert codes.shape == (4 + 3, LENGTH)
    expected = [
        [],                     # <pad>
        [259],                  # <unk>
        [260],                  # <s>
        [261],                  # </s>
        [1, 100, 101, 2],       # "a" is byte 97, so its code is 100
        [1, 198, 172, 2],       # "é" is the two bytes 195 and 169
        [1, 2]]
    for row, begin in zip(codes.tolist(), expected, strict=True):
        padding = [0] * (LENGTH - len(begin))
        assert row == begin + padding


@pytest.mark.parametrize("word, codes_of_bytes", [
    ("abcdefghijklmnopqrstuvwx", range(100, 124)),              # 24 letters: the longest word that is read whole
    ("abcdefghijklmnopqrstuvwxyz", range(100, 124)),            # 26 letters
    ("aaaaaaaaaaaaaaaaaaaaaaaé", [100] * 23 + [198])])          # the cut is inside the last letter
def test_a_word_is_cut_after_24_bytes_and_has_its_end_after_them(word, codes_of_bytes):
    codes = character_codes([word])
    assert codes[4].tolist() == [1, *codes_of_bytes, 2]


# ------------------------------------------------------------- the network in plain Python, for one word at a time
class SmallCNN(CharacterCNN):
    """The network with fewer filters, because plain loops are slow."""
    FILTERS = ((1, 3), (2, 4), (3, 5), (4, 6), (5, 7))


def plain_codes(word: str) -> list[int]:
    """The codes of a word: begin, bytes, end, padding."""
    codes = [1]
    for byte in word.encode()[:LONGEST_PART]:
        codes.append(3 + byte)
    codes.append(2)
    while len(codes) < LENGTH:
        codes.append(0)
    return codes


def dot(a: list[float], b: list[float]) -> float:
    """The sum of the products of two lists."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def plain_linear(w: Weights, name: str, x: list[float]) -> list[float]:
    """A linear layer, unit by unit."""
    outputs = []
    for row, bias in zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True):
        outputs.append(dot(row, x) + bias)
    return outputs


def plain_maxima(w: Weights, name: str, characters: list[list[float]]) -> list[float]:
    """The highest value of each filter of a convolution over all windows of a word, at least 0."""
    maxima = []
    for filter_of_unit, bias in zip(w[f"{name}.weight"], w[f"{name}.bias"], strict=True):
        columns = list(zip(*filter_of_unit, strict=True))       # one for each place in the window
        highest = 0.0
        for begin in range(len(characters) - len(columns) + 1):
            value = bias
            for column, character in zip(columns, characters[begin:], strict=False):
                value += dot(column, character)
            highest = max(highest, value)
        maxima.append(highest)
    return maxima


def plain_highway(w: Weights, name: str, x: list[float]) -> list[float]:
    """y = g * relu(new) + (1 - g) * x with g = sigmoid(gate); the layer's first half is new, the second half gate."""
    outputs = plain_linear(w, name, x)
    y = []
    for i, old in enumerate(x):
        new = max(outputs[i], 0.0)
        gate = 1 / (1 + math.exp(-outputs[len(x) + i]))
        y.append(gate * new + (1 - gate) * old)
    return y


def plain_vector(w: Weights, word: str) -> list[float]:
    """The vector of a word."""
    characters = [w["characters.weight"][code] for code in plain_codes(word)]
    x = []
    for i in range(5):
        x += plain_maxima(w, f"convolutions.{i}", characters)
    for i in range(2):
        x = plain_highway(w, f"highways.{i}", x)
    return plain_linear(w, "project", x)


def test_vectors_of_words_equal_those_of_plain_loops():
    words = ["oil", "zürich", "東京", "donaudampfschifffahrtsgesellschaft"]
    generator = torch.Generator().manual_seed(0)
    network = SmallCNN(5)
    for name, weight in network.named_parameters():
        if "bias" in name:                      # some gates are open, some are closed
            weight.data.normal_(generator=generator)
    w = {name: weight.tolist() for name, weight in network.state_dict().items()}
    with torch.no_grad():
        found = network(torch.from_numpy(character_codes(words)))[4:]
    expected = torch.tensor([plain_vector(w, word) for word in words])
    assert expected.std() > 0.1
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layer_0_of_a_text_has_the_vectors_of_the_characters_of_its_words():
    elmo = ELMo.train(SENTENCES, tiny(representation="char", epochs=1.0))
    words = ["zebra", "oil", "the"]
    expected = elmo.model.characters(torch.from_numpy(character_codes(words)))[4:]      # (3, P)
    vectors = elmo.embed(["zebra oil the oil"])[0]
    for direction in vectors[0].chunk(2, dim=-1):
        assert_close(direction[:3], expected, rtol=1e-4, atol=1e-5)
        assert_close(direction[3], expected[1], rtol=1e-4, atol=1e-5)


def test_the_padding_of_a_word_is_zeros_and_stays_zeros():
    network = CharacterCNN(5)
    network(torch.from_numpy(character_codes(["oil"]))).sum().backward()
    gradient = network.characters.weight.grad
    assert not network.characters.weight[0].any()
    assert not gradient[0].any()
    assert gradient[3 + ord("o")].any()


def test_gates_of_a_new_network_are_nearly_closed_so_that_highways_pass_on_what_they_read():
    network = CharacterCNN(5)
    read = []
    for layer in (network.highways[0], network.project):
        layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].detach()))
    network(torch.from_numpy(character_codes(["oil", "zürich"])))
    before, after = read                        # both highways; a gate of -2 lets 0.12 of the new values through
    assert (after - before).norm() < 0.5 * before.norm()
    for highway in network.highways:
        assert highway.bias[384:].tolist() == [-2] * 384
