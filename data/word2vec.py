"""Static word vectors by gensim's Word2Vec (Mikolov et al. 2013), from the training rows of a corpus."""
import numpy as np

from data.text import Data

DEFAULTS = {"epochs": 5, "window": 5, "negative": 10, "min_count": 1}


def word2vec(data: Data, size: int, seed: int, **settings) -> dict[int, np.ndarray]:
    """{word id: (size,) vector} by gensim's Word2Vec on the training rows; `settings` override DEFAULTS.

    It uses one worker, because with more the same seed gives other vectors in every run.
    """
    from gensim.models import Word2Vec  # imported here, because it takes a second
    sentences = [data.encoded.ids(row).tolist() for row in data.train]
    model = Word2Vec(sentences, vector_size=size, seed=seed, workers=1, **(DEFAULTS | settings))
    vectors = {}
    for word in range(len(data.words)):
        if word in model.wv.key_to_index:
            vectors[word] = model.wv[word]
    return vectors


def unit_variance(vectors: dict[int, np.ndarray]) -> np.ndarray:
    """(words, size) array of the vectors, scaled so that its entries have a standard deviation of 1."""
    table = np.stack(list(vectors.values()))
    std = table.std()
    return table / max(std, 1e-12)
