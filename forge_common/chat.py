"""A local page to talk with a model: python -m forge_common.chat --model DIR

It is at http://127.0.0.1:8000 until Ctrl-C. A model with a chat template has conversations; any model continues a text.
Of an assembled model each module can be switched off, and the colour of a token is the candidate whose head had the
largest weight.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import read_settings, run_main
from .errors import UserError
from .files.places import check_artifacts

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .model.protocol import LanguageModel


@dataclass(frozen=True)
class Settings:
    model: str
    """Trunk or assembled model: folder or hub id (org/name or org/name@revision)."""
    module: Path | None = None
    """Module, which is merged into the trunk: folder or hub id."""
    top_k: int | None = None
    """Candidates (the trunk and the modules) that serve a token; 0: all. None: as the model was assembled."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    host: str = "127.0.0.1"
    """Address to listen on. Anyone who reaches another one than 127.0.0.1 can use the model."""


def main(settings: Settings) -> int:
    check_artifacts([("--model", settings.model), ("--module", settings.module)])
    import torch

    from .artifacts.assembled import is_assembled, read_assembly
    from .artifacts.module_folder import read_model
    from .generation.sampling import Sampling
    from .generation.server import LOCAL, Server
    from .generation.session import Session
    from .reporting.chat_page import chat_page

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_assembled(settings.model):
        if settings.module:
            raise UserError(f"{settings.model} is an assembled model, which has its modules. Leave out --module.")
        assembly = read_assembly(settings.model, top_k=settings.top_k)
        names = ["trunk", *(part.name for part in assembly.parts)]
        tokenizer = assembly.tokenizer

        def make(without: Sequence[str]) -> "LanguageModel":
            return assembly.mixture(without).to(device).eval()
    else:
        if settings.top_k is not None:
            raise UserError(f"{settings.model} is not an assembled model. Leave out --top-k.")
        model, tokenizer, _, _ = read_model(settings.model, settings.module)
        model.to(device).eval()
        names = ["trunk"]

        def make(without: Sequence[str]) -> "LanguageModel":
            if without:
                raise UserError(f"{settings.model} is not an assembled model, so no module can be left out.")
            return model

    session = Session(make, tokenizer, device, settings.model)
    defaults = {name: value for name, value in vars(Sampling()).items() if name != "seed"}
    page = chat_page(settings.model, names, chat=tokenizer.chat is not None, defaults=defaults)
    server = Server(settings.host, settings.port, page, session)
    if settings.host not in LOCAL:
        print(f"warning     anyone who reaches {settings.host}:{server.port} can use the model", file=sys.stderr)
    host = settings.host if settings.host not in ("0.0.0.0", "::") else LOCAL[0]

    def end(*_: object) -> None:  # an exception in this thread could close a connection that is just being accepted
        session.stopping.set()
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    print(f"chat        http://{f'[{host}]' if ':' in host else host}:{server.port} (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()
        session.busy.acquire(timeout=10)  # no thread computes while the process ends
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
