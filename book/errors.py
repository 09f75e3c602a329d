"""The one kind of error that the build explains in a sentence."""


class BookError(Exception):
    "What is wrong with the book, or with the machine that builds it."
