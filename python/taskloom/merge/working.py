"""The working folder beside an output: locked, journalled, and put into the output's place in one step.

While a merge into OUT runs there are ``OUT.partial``, the folder it writes into, and ``OUT.partial.journal``, which is its lock and its
journal. At the end the folder takes OUT's name. A merge that was killed leaves both; the next one finishes them, or starts afresh.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from taskloom.merge.errors import OutputError
from taskloom.merge.execute import FinishedFile
from taskloom.merge.journal import Fingerprint, Journal, JournalState
from taskloom.merge.output import check_replaceable

_NO_MERGE = Fingerprint("", "", "", ())


def partial_folder(out: Path) -> Path:
    """The working folder of a merge into ``out``."""
    return out.with_name(out.name + ".partial")


def journal_file(out: Path) -> Path:
    """The lock and journal of a merge into ``out``."""
    return out.with_name(out.name + ".partial.journal")


def replaced_folder(out: Path) -> Path:
    """Where an output that is being replaced is on its way out."""
    return out.with_name(out.name + ".replaced")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, *, without: Container[str] = ()) -> None:
    """Sync every file and folder below ``folder`` but its own files named in ``without``, and the folder itself last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name not in without or Path(parent) != folder:
                sync(Path(parent) / name)
        sync(Path(parent))


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _open_locked(path: Path, out: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not Journal(descriptor).is_one():
                raise OutputError(f"output {out}: {path} is there and is not the journal of a merge; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed it between our open and our lock.
            if _inode(path) == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"output {out}: another merge is writing it now ({path} is locked)") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


class WorkingFolder:
    """The folder that becomes ``out``; a context manager that holds the lock.

    Leaving it by an exception removes what was begun, or, where files are finished already, keeps it for ``--resume`` and adds a note to
    the exception that says so. A ``MergeError`` and ``KeyboardInterrupt`` alike leave ``out`` as it was.

    Parameters
    ----------
    out
        The output, by its absolute path.
    overwrite
        Let :meth:`put_in_place` replace an existing output, and :meth:`begin` discard what another merge left.

    Raises
    ------
    OutputError
        If another merge holds the lock or the place cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.finished: dict[str, FinishedFile] = {}
        self._overwrite = overwrite
        self._expected = 0
        self._begun = False
        self._open = threading.Lock()
        self._closed = False

    def __enter__(self) -> WorkingFolder:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open_locked(journal_file(self.out), self.out)
        except OSError as error:
            raise OutputError(f"output {self.out}: cannot create {journal_file(self.out)}: {error.strerror}") from error
        self._journal = Journal(self._descriptor)
        try:
            self._state = self._recover()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def _recover(self) -> JournalState:
        """Finish or undo a replacement of ``out`` that was cut off."""
        state = self._journal.read()
        if state.replacement is None:
            return state
        replaced = replaced_folder(self.out)
        if _inode(self.out) == state.replacement:
            for old in (self.folder, replaced):
                if old.exists():
                    shutil.rmtree(old)
            self._journal.truncate(0)
        elif replaced.exists() and not self.out.exists():
            os.rename(replaced, self.out)
        return self._journal.read()

    def begin(self, merge: Fingerprint | None = None, *, files: int = 0, resume: bool = False) -> None:
        """Make the folder, or take over what the same merge left.

        Parameters
        ----------
        merge
            What is merged; None for work that is never resumed.
        files
            How many files it will finish.
        resume
            Keep the files that an earlier run finished, where they are still what it wrote; they are in ``finished`` then.

        Raises
        ------
        OutputError
            If something is left of another merge, or of this one and ``resume`` is false.
        """
        state = self._state
        self._expected = files
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputError(f"output {self.out}: {self.folder} is not a folder that a merge left; remove it")
        if self.folder.exists() and state.begun is None and any(self.folder.iterdir()):
            raise OutputError(f"output {self.out}: {self.folder} is not a working folder that a merge left; remove it")
        if replaced_folder(self.out).exists():
            raise OutputError(f"output {self.out}: {replaced_folder(self.out)} is in the way; remove it")
        if state.begun is not None and self.folder.exists() and state.finished:
            self._check_leftover(state, merge, resume)
        begun = None if merge is None or not resume else state.begun
        try:
            if merge is not None and begun is not None and merge.difference(begun) is None and self.folder.exists():
                self._take_over(merge, state)
            else:
                self._start_afresh(merge)
        except OSError as error:
            raise OutputError(f"output {self.out}: cannot create {self.folder}: {error.strerror}") from error

    def _check_leftover(self, state: JournalState, merge: Fingerprint | None, resume: bool) -> None:
        assert state.begun is not None
        left = f"{self.folder} is left from a merge that was cut off with {len(state.finished)} of its files finished"
        if resume and merge is not None:
            difference = merge.difference(state.begun)
            if difference is not None and not self._overwrite:
                raise OutputError(
                    f"output {self.out}: cannot resume: {self.folder} is left from another merge: {difference}; "
                    "remove it, or start afresh with --overwrite"
                )
        elif not self._overwrite:
            raise OutputError(f"output {self.out}: {left}; --resume goes on with it, --overwrite starts afresh")

    def _take_over(self, merge: Fingerprint, state: JournalState) -> None:
        self._begun = True
        self.finished = {name: file for name, file in state.finished.items() if file.is_at(self.folder / name)}
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.finished:
                path.unlink()
        # Written anew: what the torn end of a journal hides, and what has changed since (allow_nonfinite), must not stay.
        self._journal.begin(merge)
        for file in self.finished.values():
            self._journal.finish(file)

    def _start_afresh(self, merge: Fingerprint | None) -> None:
        self._begun = True
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._journal.begin(merge or _NO_MERGE)
        self.folder.mkdir()
        sync(self.out.parent)

    def finish(self, file: FinishedFile) -> None:
        """Note a file down that is finished and synced; from now on it survives. May be called from any thread."""
        with self._open:
            if self._closed:
                return
            self._journal.finish(file)
            self.finished[file.name] = file

    def put_in_place(self) -> None:
        """Give the folder, whose files must be synced, the output's name; what was there under ``overwrite`` is removed.

        Raises
        ------
        OutputError
            If something is there that may not be replaced.
        """
        sync(self.folder)
        try:
            if self._overwrite and self.out.exists() and any(self.out.iterdir()):
                # It may have come while the merge ran.
                check_replaceable(self.out)
                self._replace()
            else:
                # An empty folder at ``out`` is replaced; one that filled up meanwhile makes this fail.
                os.replace(self.folder, self.out)
                sync(self.out.parent)
        except (OSError, RuntimeError) as error:
            raise OutputError(f"output {self.out}: cannot be written: {error}") from error

    def _replace(self) -> None:
        from taskloom import _native

        replaced = replaced_folder(self.out)
        self._journal.replace(self.folder.stat().st_ino)
        if _native.exchange_names(str(self.folder), str(self.out)):
            os.rename(self.folder, replaced)
        else:
            os.rename(self.out, replaced)
            os.rename(self.folder, self.out)
        sync(self.out.parent)
        shutil.rmtree(replaced)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._open:
            self._closed = True
        try:
            self._recover()
            if error is not None and self._begun and self.finished and self.folder.exists():
                error.add_note(
                    f"{len(self.finished)} of {self._expected} files are finished and kept in {self.folder}; --resume goes on from there"
                )
                return
            if self._begun and self.folder.exists():
                shutil.rmtree(self.folder)
            if self._begun or self._state.begun is None or not self.folder.exists():
                journal_file(self.out).unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


@contextmanager
def working_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder beside ``out`` that is synced and becomes ``out`` when the block ends, and is removed when it raises.

    Raises
    ------
    OutputError
        If another merge is writing ``out``, has left files that can be resumed (unless ``overwrite``), or the place cannot be written.
    """
    with WorkingFolder(out, overwrite=overwrite) as place:
        place.begin()
        try:
            yield place.folder
            sync_tree(place.folder)
        except OSError as error:
            raise OutputError(f"output {out}: cannot be written: {error}") from error
        place.put_in_place()
