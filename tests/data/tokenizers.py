"""Small tokenizers of every kind, trained in code: how they treat spaces, control tokens and added tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [
    *SENTENCES,
    "/&.,|qa at like cat ok sure and m What is it? It is red. user assistant model 🙂",
    "<>[]|/",
]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(prefix):
    settings = {"vocab_size": 360, "special_tokens": SPECIAL, "initial_alphabet": BYTES}
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return models.BPE(), pieces, trainers.BpeTrainer(**settings, show_progress=False), decoders.ByteLevel()


def _metaspace(scheme):
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    pieces = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return models.BPE(unk_token="<unk>"), pieces, trainer, decoders.Metaspace()


def _unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return models.Unigram(), pre_tokenizers.Metaspace(), trainer, decoders.Metaspace()


def _word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return (
        models.WordPiece(unk_token="<unk>"),
        pre_tokenizers.BertPreTokenizer(),
        trainer,
        decoders.WordPiece(),
    )


def _llama_legacy():
    """Llama 2's first tokenizer.json: a normalizer writes the space, before every section too."""
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    return (
        models.BPE(unk_token="<unk>"),
        pre_tokenizers.Split("▁", "merged_with_next"),
        trainer,
        decoders.Metaspace(),
    )


KINDS = {
    "byte-level": lambda: _byte_level(False),
    "byte-level with a space": lambda: _byte_level(True),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "unigram": _unigram,
    "word piece": _word_piece,
    "llama legacy": _llama_legacy,
}


def make(kind, special=(), added=(), chat_template=None):
    """A tokenizer of a kind, with control tokens of both sorts: called special, and not."""
    model, pieces, trainer, decoder = KINDS[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoder
    if kind == "llama legacy":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    fast.chat_template = chat_template
    return fast
