"""Reading docstrings: from sources alone, in one order, past files that cannot be read."""

import sys
import textwrap

import pytest

from scree.demo import corpus


@pytest.fixture
def library(tmp_path):
    """Plant a small library; the modules raise when they are imported."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    write(
        "planted_module.py",
        '''
        """The module.

        Its second paragraph.
        """
        raise RuntimeError("planted_module was imported")

        class Box:
            """A box."""

            def open(self):
                """
                Open it.
                """
                def inner():
                    """Not to be had from outside."""

            class Lid:
                """A lid."""

        if True:
            async def fetch():
                """Fetch."""
        else:
            def other():
                """Another."""

        try:
            pass
        except ValueError:
            def late():
                """Late."""

        def again():
            """A box."""

        def silent():
            pass

        def blank():
            """   """
        ''',
    )
    write("package/__init__.py", '"""The package."""\nimport no_such_module\n')
    write("package/part.py", '"""A part."""')
    write("package/warns.py", 'PATTERN = "\\d"\n"not a docstring"\n')
    for folder in corpus.SKIPPED_FOLDERS:
        write(f"{folder}/module.py", '"""Skipped."""')
    return tmp_path


def test_names_texts_and_order(library):
    found = corpus.read(library)
    assert found.docstrings == (
        ("package", "The package."),
        ("package.part", "A part."),
        ("planted_module", "The module.\n\nIts second paragraph."),
        ("planted_module.Box", "A box."),
        ("planted_module.Box.open", "Open it."),
        ("planted_module.Box.Lid", "A lid."),
        ("planted_module.fetch", "Fetch."),
        ("planted_module.other", "Another."),
        ("planted_module.late", "Late."),
    )
    assert found.skipped == ()
    assert found.n_files == 4


def test_nothing_is_imported(library, monkeypatch):
    monkeypatch.syspath_prepend(library)
    with pytest.raises(RuntimeError, match="planted_module was imported"):  # the plant works
        import planted_module  # noqa: F401
    before = set(sys.modules)
    assert corpus.read(library).docstrings
    assert set(sys.modules) == before


def test_unreadable_files_are_skipped_and_said(library):
    (library / "bad_syntax.py").write_text('"""Text."""\nprint "python 2"\n')
    (library / "bad_bytes.py").write_bytes(b'"""caf\xe9"""\n')
    (library / "bad_encoding.py").write_bytes(b"# coding: no-such-encoding\n")
    (library / "bad_null.py").write_bytes(b'"""Text."""\x00\n')
    (library / "bad_link.py").symlink_to(library / "nowhere.py")
    good = corpus.read(library)
    assert [path.stem for path, _ in good.skipped] == [
        "bad_bytes", "bad_encoding", "bad_link", "bad_null", "bad_syntax",
    ]  # fmt: skip
    assert all(reason for _, reason in good.skipped)
    assert len(good.docstrings) == 9


def test_the_encoding_of_a_file_is_kept(tmp_path):
    (tmp_path / "latin.py").write_bytes('# coding: latin-1\n"""Größe"""\n'.encode("latin-1"))
    assert corpus.read(tmp_path).docstrings == (("latin", "Größe"),)


def test_progress_is_told(library):
    told = []
    corpus.read(library, lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"corpus: found no docstring in 0 files below .*; needs Python sources"):
        corpus.read(tmp_path)


def test_the_standard_library():
    found = corpus.read()
    names = {name for name, _ in found.docstrings}
    assert len(found.docstrings) > 3000
    assert {"os", "os.path.join", "json.dumps", "textwrap.wrap"} <= names
    assert len({text for _, text in found.docstrings}) == len(found.docstrings)
    assert all(text.strip() for _, text in found.docstrings)
    assert not {name for name in names if name.startswith(("test.", "idlelib.idle_test", "numpy"))}


def test_spread_is_even_and_the_same_every_time():
    docs = tuple(corpus.Docstring(str(i), "") for i in range(10))
    assert [name for name, _ in corpus.spread(docs, 4)] == ["0", "2", "5", "7"]
    assert corpus.spread(docs, 10) == corpus.spread(docs, 11) == docs
    with pytest.raises(ValueError, match="n: got 0; needs 1 or more"):
        corpus.spread(docs, 0)
