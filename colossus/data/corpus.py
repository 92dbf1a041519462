"""A prepared corpus, opened: its manifest, its tokenizer and its token streams."""

from functools import cached_property
from pathlib import Path

from colossus.data.manifest import MANIFEST_NAME, Manifest, SourceRecord, parse_manifest
from colossus.data.readers import listing_fingerprint
from colossus.data.shards import TokenStream, index_name
from colossus.data.storage import hash_file
from colossus.data.tokenizer import Tokenizer
from colossus.errors import DataError
from colossus.spec.base import fingerprint
from colossus.spec.data import DataConfig, LoadedTokenizer


class Corpus:
    """Token shards on disk and what they were made of.

    Attributes:
        directory: where it lies; the sources need not be on this machine.
        manifest: counts, hashes and fingerprints.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path, config: DataConfig | None = None) -> "Corpus":
        """Opens a corpus after a cheap look at its files' sizes.

        With `config`, also makes sure that it was prepared from that very configuration and that the sources
        and the tokenizer file have not changed since. Raises DataError, saying what is missing or what
        differs.
        """
        path = directory / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"no corpus in {str(directory)!r} ({MANIFEST_NAME}: {error.strerror}); prepare it first"
            ) from error
        corpus = cls(directory, parse_manifest(content, repr(str(path))))
        damage = corpus.damage()
        if damage is not None:
            raise DataError(f"the corpus in {str(directory)!r} is damaged: {damage}; prepare it again")
        differences = corpus.differences(config) if config is not None else ()
        if differences:
            raise DataError(
                f"the corpus in {str(directory)!r} is not up to date: {'; '.join(differences)}; "
                "prepare it again"
            )
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = Tokenizer.load(self.directory / self.manifest.generation)
        if tokenizer.fingerprint != self.manifest.tokenizer.file_hash:
            raise DataError(
                f"the tokenizer kept in {str(self.directory)!r} is not the one that made its tokens"
            )
        return tokenizer

    @property
    def end_of_document(self) -> int:
        """The id that stands before every document."""
        return self.manifest.tokenizer.end_of_document

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.manifest.tokenizer.vocab_size

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources."""
        return self.manifest.train_tokens

    @property
    def heldout_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return self.manifest.heldout_tokens

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return self.manifest.heldout_bytes

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the content: tokenizer and shards. The same wherever and whenever it was
        prepared."""
        splits = [split for record in self.manifest.sources for split in (record.train, record.heldout)]
        shards = [[(shard.tokens_hash, shard.index_hash) for shard in split.shards] for split in splits]
        return fingerprint([self.manifest.tokenizer.file_hash, self.manifest.token_dtype, shards])

    def train_stream(self, source: int) -> TokenStream:
        """The training tokens of one source."""
        return self._stream(self.manifest.sources[source], "train")

    def heldout_stream(self, source: int) -> TokenStream:
        """The held-out tokens of one source."""
        return self._stream(self.manifest.sources[source], "heldout")

    def _stream(self, record: SourceRecord, split: str) -> TokenStream:
        chosen = record.train if split == "train" else record.heldout
        return TokenStream(self.directory, chosen, self.manifest.token_dtype)

    def differences(self, config: DataConfig | None = None) -> tuple[str, ...]:
        """What is no longer as it was when this was prepared, a phrase each; empty when all is.

        Looks at `config` (the corpus's own when None), at the sources' listings and at the tokenizer file. A
        hub dataset is taken as unchanged: nothing is asked of the network.
        """
        config = config or self.manifest.config
        own = self.manifest.config
        found = [
            f"{name} was {getattr(own, name)!r} and is now {getattr(config, name)!r}"
            for name in ("heldout_fraction", "tokenizer")
            if getattr(own, name) != getattr(config, name)
        ]
        if config.sources != own.sources:
            found.append(f"the sources were {_paths(own)} and are now {_paths(config)}")
        found += self._changed_files(config)
        if not found and config.fingerprint() != self.manifest.config_fingerprint:
            found.append("the configuration differs")
        return tuple(found)

    def _changed_files(self, config: DataConfig) -> list[str]:
        found = []
        for record in self.manifest.sources:
            if record.source not in config.sources:
                continue
            try:
                if listing_fingerprint(record.source) != record.listing:
                    found.append(f"the files of source {record.source.path!r} have changed")
            except DataError as error:
                found.append(str(error))
        wanted = config.tokenizer
        if isinstance(wanted, LoadedTokenizer) and wanted == self.manifest.config.tokenizer:
            try:
                changed = Tokenizer.load(Path(wanted.path)).fingerprint != self.manifest.tokenizer.file_hash
            except DataError as error:
                found.append(str(error))
            else:
                if changed:
                    found.append(f"the tokenizer file {wanted.path!r} has changed")
        return found

    def damage(self) -> str | None:
        """The first shard that is missing or has the wrong size, or None; no shard is read."""
        width = 2 if self.manifest.token_dtype == "uint16" else 4
        for record in self.manifest.sources:
            for shard in (*record.train.shards, *record.heldout.shards):
                expected = {
                    shard.file: shard.tokens * width,
                    index_name(shard.file): (shard.documents + 1) * 16,
                }
                for name, size in expected.items():
                    path = self.directory / name
                    if not path.is_file():
                        return f"{name} is missing"
                    if path.stat().st_size != size:
                        return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        return None

    def verify(self) -> None:
        """Reads every shard and compares its hash with the manifest. Raises DataError naming the first that
        differs."""
        damage = self.damage()
        for record in self.manifest.sources:
            for shard in (*record.train.shards, *record.heldout.shards):
                for name, expected in (
                    (shard.file, shard.tokens_hash),
                    (index_name(shard.file), shard.index_hash),
                ):
                    if damage is None and hash_file(self.directory / name) != expected:
                        damage = f"the content of {name} is not what was written"
        if damage is not None:
            raise DataError(f"the corpus in {str(self.directory)!r} is damaged: {damage}; prepare it again")
        _ = self.tokenizer


def _paths(config: DataConfig) -> str:
    return ", ".join(
        f"{source.path!r} (weight {source.weight:g}, field {source.text_field!r})"
        for source in config.sources
    )


def corpus_directory(config: DataConfig, runs_directory: Path) -> Path:
    """Where runs keep the corpus that `config` describes: runs of the same text and tokenizer share it."""
    return runs_directory / "corpora" / config.fingerprint()
