"""Where text comes from; and how it becomes token sequences and words with exact offsets.

- `passages.py`: a text with its document, labels and spans
- `marked.py`: spans marked in the text itself
- `readers.py`: passages from strings, files (one reader per type), tables and data sets
- `records.py`: how a row or object becomes a passage
- `datasets.py`: passages by name: built in, of NLTK, of the Hugging Face Hub
- `corpora.py`: NLTK's corpora as readable text, with their own words and tags where they have them
- `licences.py`: licence texts of the installed distributions
- `tokens.py`: passages -> token sequences
- `copies.py`: which texts are copies of one another, nearly or in full
- `words.py`: words with their part of speech; which word a token belongs to
- `taggers.py`: passages -> words
"""

from basin_lens.texts.datasets import has_splits, read_dataset
from basin_lens.texts.licences import Licences, find_licences
from basin_lens.texts.marked import MarkedText, read_marks, skeleton_of
from basin_lens.texts.passages import Passage, Texts, reference_passages
from basin_lens.texts.readers import read_by_document, read_file, read_jsonl, read_marked, read_passages, read_texts
from basin_lens.texts.taggers import words_of
from basin_lens.texts.tokens import TokenSequence, from_token_ids, given_ids, longest_sequence, real_tokens, token_strings, tokenize
from basin_lens.texts.words import TAGS, TaggedPassage, Word, word_of_tokens

__all__ = [
    "TAGS",
    "Licences",
    "MarkedText",
    "Passage",
    "TaggedPassage",
    "Texts",
    "TokenSequence",
    "Word",
    "find_licences",
    "from_token_ids",
    "given_ids",
    "has_splits",
    "longest_sequence",
    "read_by_document",
    "read_dataset",
    "read_file",
    "read_jsonl",
    "read_marked",
    "read_marks",
    "read_passages",
    "read_texts",
    "real_tokens",
    "reference_passages",
    "skeleton_of",
    "token_strings",
    "tokenize",
    "word_of_tokens",
    "words_of",
]
