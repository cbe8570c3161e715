"""GPT-2's byte-level BPE over a `tokenizer.json`, as SmolLM2 uses it: digits one by one.

The standard library only. Its `re` has no Unicode categories, so the text is first mapped,
character by character, onto a small ASCII alphabet that keeps what GPT-2's expression looks at
(letter, number, space, the letters of contractions); the expression runs over that shadow, and its
matches cut the real text.
"""

import functools
import json
import pathlib
import re
import unicodedata

# GPT-2's expression over the shadow: contractions, words, one digit, punctuation, spaces. A digit
# ends the piece before it, so spaces in front of one are not split off from each other.
WORD = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+|0| ?[^\sA-Za-z0]+|\s+(?![^\s0])|\s+")


@functools.cache
def shadow(char: str) -> str:
    """The ASCII character that stands for `char`: itself where contractions need it, else Z for a
    letter, 0 for a number, tab for a space other than ' ', ! for the rest."""
    category = unicodedata.category(char)
    if category[0] == "L":
        return char if char.isascii() else "Z"
    if category[0] == "N":
        return "0"
    if char.isspace() and not "\x1c" <= char <= "\x1f":
        return char if char == " " else "\t"
    return "'" if char == "'" else "!"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


class Tokenizer:
    """Text to token IDs and back. Read-only after construction."""

    def __init__(self, model_dir: str | pathlib.Path):
        data = json.loads((pathlib.Path(model_dir) / "tokenizer.json").read_text(encoding="utf-8"))
        self._ids: dict[str, int] = data["model"]["vocab"]
        self._tokens = {i: token for token, i in self._ids.items()}
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(data["model"]["merges"])}
        self._special = {token["content"]: token["id"] for token in data["added_tokens"]}
        self._special_ids = set(self._special.values())
        self._special_pattern = re.compile(
            "(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")")
        self._alphabet = byte_alphabet()
        self._bytes = {char: byte for byte, char in self._alphabet.items()}
        self._encode_word = functools.lru_cache(maxsize=65536)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Token IDs; special tokens in the text are recognised. Adds none."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
                continue
            for match in WORD.finditer("".join(map(shadow, part))):
                ids.extend(self._encode_word(part[match.start():match.end()]))
        return ids

    def decode(self, ids) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        out = bytearray()
        for i in ids:
            token = self._tokens[i]
            if i in self._special_ids:
                out += token.encode()
            else:
                out += bytes(self._bytes[char] for char in token)
        return out.decode("utf-8", errors="replace")

    def _merge(self, word: str) -> tuple[int, ...]:
        """Joins the pair of lowest rank, everywhere in the word, until no pair has one. A byte that
        the vocabulary lacks (rare control bytes) is dropped, as Hugging Face's tokenizers do."""
        chars = (self._alphabet[byte] for byte in word.encode())
        parts = [char for char in chars if char in self._ids]
        while len(parts) > 1:
            rank, pair = min((self._ranks.get(pair, len(self._ranks)), pair)
                             for pair in zip(parts, parts[1:]))
            if rank == len(self._ranks):
                break
            joined, i = [], 0
            while i < len(parts):
                if tuple(parts[i:i + 2]) == pair:
                    joined.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            parts = joined
        return tuple(self._ids[part] for part in parts)
