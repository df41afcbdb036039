"""What to do in a study where the message of a run names options that only train_net.py has."""

from pathlib import Path

_AGAIN = "call the study again: it goes on with the run"
_ANEW = "delete {folder} and call the study again to train the run anew"
_WAYS = {
    "--resume": _AGAIN,
    "--allow-config-change": _ANEW,
    "--overwrite": _ANEW,
    "--doctor": "{folder}/doctor.json has what the doctor found",
    "--trust-config": "a study executes no LazyConfig; name a teacher with a yaml",
}


def ways_out(message: str, folder: Path) -> str:
    """What to add to the last line of a run; "" where it names no such option.

    Args:
        folder: of the run.
    """
    words = {word.strip("().,:;") for word in message.split()}
    found = {option: text for option, text in _WAYS.items() if option in words}
    if _ANEW in found.values():
        found.pop("--resume", None)  # as the way back to it has failed
    texts = dict.fromkeys(text.format(folder=folder) for text in found.values())
    return f" (in a study: {'; '.join(texts)})" if texts else ""
