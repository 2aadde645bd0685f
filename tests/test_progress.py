"""Progress of work: nothing on standard output, a line a part where there is no terminal."""

from cpt_jax import progress


def test_parts_are_said_on_standard_error_and_now_and_then_how_far(capsys, monkeypatch):
  monkeypatch.setattr(progress, "EVERY_SECS", -1.0)
  with progress.Progress() as shown:
    advance = shown.part("read the domain", 4000, unit=1000)
    advance(1000)
    advance(3000)
    shown.part("choose pieces")
  said = capsys.readouterr()
  assert said.out == ""
  assert said.err.splitlines() == ["read the domain ...", "read the domain: 25%", "read the domain: 100%", "choose pieces ..."]
  monkeypatch.undo()
  with progress.Progress() as shown:
    shown.part("quick", 2)(1)
  assert capsys.readouterr().err == "quick ...\n"
