import io

from drumline.engine.commands.transcript import Transcript


def transcript(*labels: str) -> tuple[Transcript, io.StringIO]:
    out = io.StringIO()
    return Transcript(labels, [""] * len(labels), out), out


def test_one_block_is_its_text_alone_and_ends_its_line() -> None:
    shown, out = transcript("a")
    shown.add(0, "one ")
    assert out.getvalue() == "one "
    shown.add(0, "two")
    shown.end(0)
    assert out.getvalue() == "one two\n"


def test_a_later_block_waits_for_its_turn_and_then_streams() -> None:
    shown, out = transcript("a", "b", "c")
    shown.add(1, "B")
    shown.add(2, "C\n")
    shown.end(2)
    shown.add(0, "A")
    assert out.getvalue() == "--- a\nA"
    shown.end(0)
    assert out.getvalue() == "--- a\nA\n\n--- b\nB"
    shown.add(1, "b")
    shown.end(1)
    assert out.getvalue() == "--- a\nA\n\n--- b\nBb\n\n--- c\nC\n"


def test_an_interruption_ends_the_line() -> None:
    shown, out = transcript("a")
    shown.add(0, "half a li")
    shown.interrupted()
    assert out.getvalue() == "half a li\n"


def test_a_block_begins_with_its_lead() -> None:
    out = io.StringIO()
    shown = Transcript(["a"], ["lead "], out)
    shown.add(0, "text")
    shown.end(0)
    assert out.getvalue() == "lead text\n"
