"""Turn the corpus into token streams: split it, train the tokenizer, encode both parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from base_tiny.corpus import Document, Limits, docstring_pairs, load_corpus, shuffle_key, split
from base_tiny.tokenizer import ASSISTANT, BOS, END, EOS, SYSTEM, USER, train_tokenizer

Ids = npt.NDArray[np.int64]
SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Data:
    """Hold the tokenizer and the two token streams."""

    tokenizer: Tokenizer
    train: Ids  # shape (training tokens,)
    held: Ids  # shape (held-out tokens,)
    train_bytes: int
    held_bytes: int


def chat_documents(documents: list[Document], cap: int, seed: int) -> list[str]:
    """Make short dialogues from docstrings, so that the chat tokens are trained as well.

    LoRA leaves the embeddings alone: a special token that the base never saw could hardly be
    learned later on.
    """
    pairs = {
        pair: hashlib.sha256("\0".join(pair).encode()).hexdigest()
        for document in documents
        if document.source == "stdlib"
        for pair in docstring_pairs(document.text)
    }
    dialogues: list[str] = []
    size = 0
    for pair in sorted(pairs, key=lambda pair: shuffle_key(pairs[pair], seed)):
        signature, docstring = pair
        head = f"{SYSTEM}{SYSTEM_PROMPT}{END}" if len(dialogues) % 4 == 0 else ""
        question = f"What does this Python code do?\n{signature}"
        text = f"{head}{USER}{question}{END}{ASSISTANT}{docstring}{END}"
        size += len(text)
        if size > cap:
            break
        dialogues.append(text)
    return dialogues


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """Encode texts into one stream: <|bos|> text <|eos|> <|bos|> text <|eos|> ..."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        stream += [bos, *encoding.ids, eos]
    return np.array(stream, dtype=np.int64)


def prepare_data(scale: float, held_out: float, seed: int) -> Data:
    """Collect the corpus, train the tokenizer on the training part, and encode both parts."""
    limits = Limits().scaled(scale)
    documents = load_corpus(limits, seed)
    train, held = split(documents, held_out)
    if not train or not held:
        raise ValueError("the corpus is too small to split")
    texts = [document.text for document in train]
    tokenizer = train_tokenizer(texts)
    dialogues = chat_documents(train, limits.chat, seed)
    held_texts = [document.text for document in held]
    mixed = texts + dialogues
    mixed.sort(key=lambda text: shuffle_key(hashlib.sha256(text.encode()).hexdigest(), 0))
    return Data(
        tokenizer=tokenizer,
        train=encode_documents(tokenizer, mixed),
        held=encode_documents(tokenizer, held_texts),
        train_bytes=sum(len(text.encode()) for text in mixed),
        held_bytes=sum(len(text.encode()) for text in held_texts),
    )


def load_data(scale: float, held_out: float, seed: int, cache: Path | None) -> Data:
    """Prepare the data, or take it from the cache folder if a run left it there."""
    if cache is None:
        return prepare_data(scale, held_out, seed)
    arrays, vocabulary = cache / "tokens.npz", cache / "tokenizer.json"
    if not arrays.exists():
        data = prepare_data(scale, held_out, seed)
        cache.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(str(vocabulary))
        sizes = np.array([data.train_bytes, data.held_bytes])
        np.savez(arrays, train=data.train, held=data.held, sizes=sizes)
        return data
    with np.load(arrays) as stored:
        train, held, sizes = stored["train"], stored["held"], stored["sizes"]
    tokenizer = Tokenizer.from_file(str(vocabulary))
    return Data(tokenizer, train, held, int(sizes[0]), int(sizes[1]))
