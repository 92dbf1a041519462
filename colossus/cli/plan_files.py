"""Writing a plan and its picture without ever losing a file that is there."""

import os
import stat
import tempfile
from pathlib import Path

from colossus.errors import ConfigError


def refuse_existing(out: Path | None, plot: Path | None, force: bool) -> None:
    """Before the search, not after it."""
    if out is not None and plot is not None and os.path.realpath(out) == os.path.realpath(plot):
        raise ConfigError(f"--out and --plot both name {out}; a file holds one of them")
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot} is drawn as a PNG; give it a name that ends in .png")
    for option, path in (("--out", out), ("--plot", plot)):
        if path is None:
            continue
        refuse_no_place(option, path)
        if os.path.lexists(path) and not force:
            raise ConfigError(
                f"{option} {path} exists and is kept; name another file, or write over it with --force"
            )


def refuse_no_place(option: str, path: Path) -> None:
    """Raises ConfigError where no file can be made, before minutes are spent on what would be in it."""
    refuse_special(option, path)
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{option} {path} cannot be written: {path.parent} may only be read; name another place"
        )


def refuse_special(option: str, path: Path) -> None:
    """Raises ConfigError for devices, pipes and sockets, which a file takes the place of when it is renamed onto them,
    and for names that no file can have."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:  # a zero byte
        raise ConfigError(f"{option} cannot be written: {error}") from None
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror or error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{option} {path} is a device or a pipe, not a file; name a file")


def write(path: Path, content: bytes, force: bool) -> None:
    """Whole or not at all; a file that came to be in the meantime is kept, unless by force."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as any new file, not as a private one
        if force:
            temporary.replace(path)
        else:
            _keep_existing(temporary, path)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is kept; name another file, or write over it with --force"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _keep_existing(temporary: Path, path: Path) -> None:
    """Gives a file its name unless that is taken; raises FileExistsError then."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        if path.exists():
            raise FileExistsError(path) from None
        temporary.replace(path)
