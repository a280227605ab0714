"""What can be at a URL such as `s3://bucket/name`: the storage that fsspec knows. Torch-free."""


def is_url(path: str) -> bool:
    """Whether a path says how it is reached."""
    return "://" in path


def protocol_problem(url: str) -> str | None:
    """Why nothing can be at this URL, whatever is installed; None if something can."""
    import fsspec  # which imports what decompresses, and is seldom needed

    protocol = url.partition("://")[0]
    if all(x in {*fsspec.available_protocols(), *fsspec.registry} for x in protocol.split("::") if x):
        return None
    return f"fsspec knows no {protocol}://; give a path, or a URL as in s3://bucket/name"
