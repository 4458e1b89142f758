"""Stub."""


def write(book, entries, folder):
    return ""
