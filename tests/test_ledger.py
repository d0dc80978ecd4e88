import json
import os
import resource

import pytest

from llm_duel_env.ledger import Ledger, LedgerError, LedgerMismatch

HEADER = {"seed": 1, "task": "t"}


def record(n, first="a", second="b", label=1.0, prompt="猫?"):
    fields = {"round": 0, "prompt_id": n, "prompt": prompt, "first": first, "second": second, "probability": 0.75}
    return {"query": n, **fields, "label": label}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "ledger.jsonl"


def filled(path, count=3):
    with Ledger(path, HEADER) as ledger:
        ledger.append([record(n) for n in range(count)])
    return path


def test_records_come_back_in_any_order_and_after_reopening(path):
    filled(path)
    with Ledger(path, HEADER) as ledger:
        ledger.append([record(3, first="é🙂\u2028\n")])
        assert len(ledger) == 4
        assert [ledger.record(n)["query"] for n in (3, 0, 2)] == [3, 0, 2]
        assert ledger.record(3)["first"] == "é🙂\u2028\n"
        with pytest.raises(IndexError, match="0 to 3, got 4"):
            ledger.record(4)
    lines = path.read_bytes().splitlines()
    assert json.loads(lines[0]) == {"header": HEADER}
    assert "猫".encode() in lines[1]


def test_a_round_is_synced_once_and_before_append_returns(path, monkeypatch):
    synced = []
    real = os.fsync
    with Ledger(path, HEADER) as ledger:
        monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(path.read_bytes().count(b"\n")), real(fd)))
        ledger.append([record(0), record(1)])
        ledger.append([])
    assert synced == [3]


@pytest.mark.parametrize("torn", [b'{"query": 3, "rou', b'{"query": 3}garbage', b"\x00\x00\x00"])
def test_a_torn_last_line_is_cut(path, torn):
    whole = filled(path).read_bytes()
    path.write_bytes(whole + torn)
    with Ledger(path, HEADER) as ledger:
        assert len(ledger) == 3
        assert path.read_bytes() == whole
        ledger.append([record(3)])
    with Ledger(path, HEADER) as ledger:
        assert ledger.record(3) == record(3)


def test_a_cut_at_any_byte_leaves_the_whole_records(path):
    whole = filled(path).read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Ledger(path, HEADER) as ledger:
            assert len(ledger) == max(whole[:size].count(b"\n") - 1, 0)
            ledger.append([record(n) for n in range(len(ledger), 3)])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damaged", [b'{"query": 3}garbage\n', b"\x00\x00\n", b"\n"])
def test_a_damaged_last_line_that_was_written_whole_is_an_error_that_names_it(path, damaged):
    whole = filled(path).read_bytes() + damaged
    path.write_bytes(whole)
    with pytest.raises(LedgerError, match="line 5: expected a JSON object"):
        Ledger(path, HEADER)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("other", [b"my notes", b"my notes\n", b'{"a": 1}', b'{"a": 1}\n', b"\x00\x00", b"{}", b"\n"])
def test_a_file_that_is_no_ledger_is_left_as_it_is(tmp_path, other):
    path = tmp_path / "notes.txt"
    path.write_bytes(other)
    for header in (None, HEADER):
        with pytest.raises(LedgerError, match="line 1: expected"):
            Ledger(path, header)
        assert path.read_bytes() == other


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(path):
    lines = filled(path).read_bytes().splitlines(keepends=True)
    for damaged in (b"not json\n", b'{"query": 9}\n', lines[3], b"[1]\n"):
        path.write_bytes(b"".join([lines[0], lines[1], damaged, lines[3]]))
        with pytest.raises(LedgerError, match="line 3"):
            Ledger(path, HEADER)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(LedgerError, match="line 1: expected the header"):
        Ledger(path, HEADER)
    assert path.read_bytes() == b"".join(lines[1:])


def test_another_run_may_not_open_it(path):
    with Ledger(path, HEADER), pytest.raises(LedgerError, match="another run has this ledger open"):
        Ledger(path, HEADER)
    Ledger(path, HEADER).close()


def test_the_header_says_whose_labels_these_are(path):
    filled(path)
    with pytest.raises(LedgerMismatch, match=r"holds 3 labels of a different run .seed was 1, now 2"):
        Ledger(path, {**HEADER, "seed": 2})
    with Ledger(path) as ledger:
        assert ledger.header == HEADER


def test_a_ledger_without_labels_takes_a_new_header(path):
    Ledger(path, HEADER).close()
    Ledger(path, {"seed": 2}).close()
    assert path.read_text() == '{"header": {"seed": 2}}\n'


def test_replay_compares(path):
    filled(path)
    with Ledger(path, HEADER) as ledger:
        assert ledger.replay(1, record(1, label=0.0))["label"] == 1.0
        for other in (record(2), record(1, first="c"), record(1, second="c")):
            with pytest.raises(LedgerMismatch, match="query 1 was about"):
                ledger.replay(1, other)


def test_records_out_of_order_or_incomplete_write_nothing(path):
    whole = filled(path).read_bytes()
    with Ledger(path, HEADER) as ledger:
        for bad in ([record(4)], [record(3), record(3)], [{"query": 3}], [{**record(3), "more": 1}]):
            with pytest.raises(ValueError, match="expected query"):
                ledger.append(bad)
        with pytest.raises(ValueError, match="JSON"):
            ledger.append([record(3), {**record(4), "probability": float("nan")}])
        assert len(ledger) == 3
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_ledger_whole(path):
    whole = filled(path).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(path, HEADER) as ledger:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limit[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                ledger.append([record(3)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert path.read_bytes() == whole
        ledger.append([record(3)])
        assert ledger.record(3) == record(3)


def test_export_leaves_ties_out_and_puts_the_winner_first(path, tmp_path):
    with Ledger(path, HEADER) as ledger:
        ledger.append([record(0), record(1, label=0.0), record(2, label=0.5), record(3, 4, 5, 0.0, prompt=None)])
        assert ledger.export_preferences(tmp_path / "pairs.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_bytes().splitlines()]
    assert rows == [
        {"prompt": "猫?", "chosen": "a", "rejected": "b"},
        {"prompt": "猫?", "chosen": "b", "rejected": "a"},
        {"prompt": "3", "chosen": "5", "rejected": "4"},
    ]


def test_export_refuses_the_ledger_itself_under_any_name(path):
    whole = filled(path).read_bytes()
    link = path.with_name("link")
    link.symlink_to(path)
    hard = path.with_name("hard")
    os.link(path, hard)
    with Ledger(path) as ledger:
        for name in (path, str(path.parent / ".." / path.parent.name / path.name), link, hard):
            with pytest.raises(ValueError, match="is the ledger itself"):
                ledger.export_preferences(name)
    assert path.read_bytes() == whole


def test_an_export_that_breaks_leaves_the_last_one(path, tmp_path, monkeypatch):
    out = tmp_path / "pairs.jsonl"
    with Ledger(filled(path)) as ledger:
        ledger.export_preferences(out)
        before = out.read_bytes()
        read = ledger.record
        monkeypatch.setattr(ledger, "record", lambda number: read(number) if number < 2 else read(99))
        with pytest.raises(IndexError):
            ledger.export_preferences(out)
    assert out.read_bytes() == before


def test_an_export_goes_into_a_pipe(path, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with Ledger(filled(path)) as ledger:
        assert ledger.export_preferences(pipe) == 3
    assert os.read(reader, 10_000).count(b"\n") == 3
    os.close(reader)
    assert pipe.is_fifo()
