"""The demo: a web page to ask a run, with its finetunes side by side.

``asked`` what is asked and answered      ``of_runs``, ``of_server`` who answers (a `Source`)
``board``, ``snippets``, ``about`` what is shown      ``page`` where it stands      ``events`` what happens there

Whatever people upload or type is untrusted: images go through the toolkit's decoder, and answers are shown as text,
never as HTML or Markdown. The page listens on this machine alone unless told otherwise.
"""
