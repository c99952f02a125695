"""The command of the demo; libraries come in only where it needs them."""

from mmpeft.errors import RefusedError
from mmpeft.runs.layout import RUN


def demo(
    run: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    server: str | None = None,
    api_key: str | None = None,
) -> None:
    """Opens a web page to ask runs about images, their finetunes side by side.

    Needs the extra [demo]: pip install 'mmpeft[demo]'.

    Args:
        run: directories that `mmpeft fit` wrote, of one base; runs/quickstart by default.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: port to listen at.
        share: also make a public address, through a tunnel of gradio's makers.
        server: address of `mmpeft serve`, or of another server of OpenAI's API, to ask instead of loading runs.
        api_key: the server's, where it wants one.
    """
    from mmpeft.runs.manifest import read_manifest
    from mmpeft.serving.client import named_server

    runs = run or [RUN]
    named = named_server(server, api_key, ", ".join(runs))
    for each in runs if named is None else ():
        read_manifest(each)  # seconds of libraries, for what is not refused
    try:
        from mmpeft.demo.launch import launch
    except ImportError as error:
        raise RefusedError(
            f"{error.name} is missing, which the page needs: pip install 'mmpeft[demo]'"
        ) from None
    launch(runs, named, host, port, share)
