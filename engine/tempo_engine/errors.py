"""The one exception that means "the user can mend this": one sentence with what was wanted, what was found, what to do."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command. The command line prints the sentence and exits with code 2."""


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's message: some print whole pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")
