"""Where text comes from; and how it becomes token sequences and words with exact offsets.

- `passages.py`: a text with its document, labels and spans; from strings, files, JSON lines, tables of the `datasets` library
- `datasets.py`: passages by name: built in, of NLTK, of the Hugging Face Hub
- `corpora.py`: NLTK's corpora as readable text, with their own words and tags where they have them
- `licences.py`: licence texts of the installed distributions
- `tokens.py`: passages -> token sequences
- `copies.py`: which texts are copies of one another, nearly or in full
- `words.py`: words with their part of speech; which word a token belongs to
- `taggers.py`: passages -> words
"""

from basin_lens.texts.datasets import read_dataset
from basin_lens.texts.licences import Licences, find_licences
from basin_lens.texts.passages import Passage, read_file, read_jsonl, read_passages, read_texts, reference_passages
from basin_lens.texts.taggers import words_of
from basin_lens.texts.tokens import TokenSequence, from_token_ids, longest_sequence, token_strings, tokenize
from basin_lens.texts.words import TAGS, TaggedPassage, Word, word_of_tokens

__all__ = [
    "TAGS",
    "Licences",
    "Passage",
    "TaggedPassage",
    "TokenSequence",
    "Word",
    "find_licences",
    "from_token_ids",
    "longest_sequence",
    "read_dataset",
    "read_file",
    "read_jsonl",
    "read_passages",
    "read_texts",
    "reference_passages",
    "token_strings",
    "tokenize",
    "word_of_tokens",
    "words_of",
]
