"""Paths of the server's resources."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

INSTANCES: Final = "/v1/instances"
IMAGES: Final = "/v1/images"
VOLUMES: Final = "/v1/volumes"
TOKENS: Final = "/v1/tokens"
NETWORKS: Final = "/v1/networks"
SECURITY_GROUPS: Final = "/v1/security-groups"
PROJECTS: Final = "/v1/projects"
HOSTS: Final = "/v1/hosts"

COLLECTIONS: Final = {
    "VM": INSTANCES,
    "Image": IMAGES,
    "Volume": VOLUMES,
    "Network": NETWORKS,
    "Security group": SECURITY_GROUPS,
    "Token": TOKENS,
    "Project": PROJECTS,
    "Host": HOSTS,
}
"""By the name of the resource in an error of the server."""


def path_of(collection: str, reference: str, *rest: str) -> str:
    """Return the path of a resource, with the reference quoted."""
    return "/".join((collection, quote(reference, safe=""), *rest))
