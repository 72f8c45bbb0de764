"""Whatever a caller gets wrong is the caller's, said plainly, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator

import httpx
import pytest

from api.conftest import BODY_BYTES_MAX, UPLOAD_BYTES_MAX, ApiServer, make
from in_process.embedded import IMAGE
from interlock.api.http.multipart_upload import FOLDER_PREFIX
from interlock.core.errors import BrokenInvariant, InterlockError, StoreFull, Unavailable
from interlock.core.roles import Role
from interlock.service import capacity

JSON = {"Content-Type": "application/json"}
REQUESTS = "/v1/instances/vm/requests"


def problem(answer: httpx.Response, status: int, name: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said: dict[str, object] = answer.json()
    assert (said["status"], said["type"]) == (status, f"urn:interlock:problem:{name}")
    assert said["title"]
    assert said["detail"]
    return said


@pytest.mark.parametrize(
    ("body", "status", "name", "part"),
    [
        (b"", 400, "not-json", "JSON"),
        (b'{"operation": "stop"', 400, "not-json", "JSON"),
        (b'{"operation": "stop"} x', 400, "not-json", "JSON"),
        (b"\xff\xfe", 400, "not-json", "JSON"),
        (b'{"operation": "stop", "operation": "delete"}', 400, "duplicate-key", "operation"),
        (b'{"operation": "stop", "parameters": {"hard": false, "hard": true}}', 400, "duplicate-key", "hard"),
        (b'{"operation": "stop", "\\u006fperation": "start"}', 400, "duplicate-key", "operation"),
        (b"[" * 3000, 422, "invalid", "object"),
        (b'{"operation": "stop", "parameters": ' + b'{"a":' * 600, 400, "not-json", "JSON"),
        (b"[]", 422, "invalid", "object"),
        (b'{"operation": 7}', 422, "invalid", "operation: expected"),
        (b'{"operation": "explode"}', 422, "invalid", "explode"),
        (b'{"operation": "stop", "parameters": []}', 422, "invalid", "parameters: expected an object"),
        (b'{"operation": "stop", "parameters": {"hard": 1}}', 422, "invalid", "hard"),
        (b'{"operation": "stop", "parameters": {"soft": true}}', 422, "invalid", "soft"),
        (b'{"operation": "attach_volume", "parameters": {"volume": "../../etc/passwd"}}', 404, "not-found", "Volume"),
    ],
)
async def test_a_wrong_body_is_told_where_it_is_wrong(
    admin: httpx.AsyncClient, body: bytes, status: int, name: str, part: str
) -> None:
    await make(admin, "vm", start=False)
    said = problem(await admin.post(REQUESTS, content=body, headers=JSON), status, name)
    assert part in str(said["detail"])
    assert (await admin.get("/v1/instances/vm")).json()["outstanding"] == []


async def test_an_unknown_field_names_the_one_that_was_meant(admin: httpx.AsyncClient) -> None:
    said = problem(await admin.post("/v1/instances", json={"name": "a", "image": "b", "vcpu": 2}), 422, "invalid")
    assert "vcpu" in str(said["detail"])
    assert said["remedy"] == "Did you mean `vcpus`?"
    said = problem(await admin.get("/v1/instances", params={"vmstate": "active"}), 422, "invalid")
    assert said["remedy"] == "Did you mean `vm_state`?"


async def test_a_query_says_each_thing_once(admin: httpx.AsyncClient) -> None:
    said = problem(await admin.get("/v1/instances?name=one&name=two"), 422, "invalid")
    assert "Duplicate query parameter 'name'" in str(said["detail"])
    said = problem(await admin.get("/v1/policy/history/newest"), 404, "not-found")
    assert "newest" in str(said["detail"])


async def test_a_name_that_is_none_is_told_in_words(admin: httpx.AsyncClient) -> None:
    said = problem(await admin.post("/v1/instances", json={"name": "Bad Name", "image": "nothing"}), 422, "invalid")
    assert "letters, digits, hyphens, dots and underscores" in str(said["detail"])
    assert "regex" not in str(said)


@pytest.mark.parametrize(
    "wish",
    [
        {"name": "../up"},
        {"name": ".hidden"},
        {"name": "a/b"},
        {"name": "_a"},
        {"name": "a-"},
        {"name": "naïve"},
        {"name": ""},
        {"name": "a\n"},
        {"name": "x" * 64},
        {"name": "0197b7a0-0000-7000-8000-000000000000"},
        {"memory_mib": 10**30},
        {"memory_mib": 1_000_000},
        {"vcpus": 0},
        {"vcpus": 1.5},
        {"tags": ["t"] * 65},
        {"tags": ["t" * 65]},
        {"forwards": [{"host_port": 80, "guest_port": 80}]},
        {"blocked_operations": ["explode"]},
    ],
)
async def test_absurd_wishes_make_nothing(admin: httpx.AsyncClient, wish: dict[str, object]) -> None:
    body = json.dumps({"name": "vm", "image": IMAGE.name, **wish})
    problem(await admin.post("/v1/instances", content=body, headers=JSON), 422, "invalid")
    assert (await admin.get("/v1/instances")).json()["items"] == []


async def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(admin: httpx.AsyncClient) -> None:
    large = b" " * (BODY_BYTES_MAX + 1)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield large[:100]

    for content in (large, chunks()):
        problem(await admin.post(REQUESTS, content=content, headers=JSON), 413, "too-large")


async def test_a_body_of_another_type_is_refused(admin: httpx.AsyncClient) -> None:
    answer = await admin.post(REQUESTS, content=b"operation=stop", headers={"Content-Type": "text/plain"})
    problem(answer, 415, "media-type")


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer ilk_wrong", "Basic YTpi", "Bearer \xe9"])
async def test_without_a_valid_token_nothing_is_answered(api: ApiServer, authorization: str | None) -> None:
    client = api.client(None)
    headers = [] if authorization is None else [(b"Authorization", authorization.encode("latin-1"))]
    answer = await client.get("/v1/instances", headers=headers)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_a_deleted_token_opens_nothing(api: ApiServer, admin: httpx.AsyncClient) -> None:
    other = await api.token("other", Role.READER)
    assert (await other.get("/v1/instances")).status_code == 200
    assert (await admin.delete("/v1/tokens/other")).status_code == 204
    problem(await other.get("/v1/instances"), 401, "unauthorized")


async def test_of_two_who_make_a_token_of_one_name_at_once_one_does(admin: httpx.AsyncClient) -> None:
    wish = {"name": "twice", "role": "reader", "project": "default"}
    answers = await asyncio.gather(*(admin.post("/v1/tokens", json=wish) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    problem(next(answer for answer in answers if answer.status_code == 409), 409, "name-taken")
    tokens = (await admin.get("/v1/tokens")).json()["items"]
    assert [token["name"] for token in tokens].count("twice") == 1


async def test_unknown_paths_and_methods(admin: httpx.AsyncClient) -> None:
    for path in ("/v2/instances", "/v1/instance", "/v1/instances/", "/v1/instances/a/b/c"):
        problem(await admin.get(path), 404, "no-such-path")
    answer = await admin.delete("/v1/instances")
    problem(answer, 405, "method-not-allowed")
    assert {"GET", "POST"} <= set(answer.headers["allow"].split(", "))


async def test_the_front_page_leads_to_the_documentation(api: ApiServer) -> None:
    answer = await api.client(None).get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")
    assert "swagger" in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/instances",
        "/v1/instances/vm",
        "/v1/policy",
        "/v1/images",
        "/v1/host",
        "/v1/stuck",
    ],
)
async def test_who_has_the_present_answer_already_is_told_so(
    admin: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What others write to this machine's disk is another answer of `/v1/host`.
    monkeypatch.setattr(capacity, "disk_free_mib", lambda _folder: 1_000)
    await make(admin, "vm", start=False)
    etag = (await admin.get(path)).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        for method in ("GET", "HEAD"):
            same = await admin.request(method, path, headers={"If-None-Match": known})
            assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert (await admin.get(path, headers={"If-None-Match": '"other"'})).status_code == 200


async def test_a_change_of_the_instance_is_another_answer(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm", start=False)
    etag = (await admin.get("/v1/instances/vm")).headers["etag"]
    await admin.patch("/v1/instances/vm", json={"tags": ["new"]})
    answer = await admin.get("/v1/instances/vm", headers={"If-None-Match": etag})
    assert (answer.status_code, answer.json()["tags"]) == (200, ["new"])


async def test_head_is_get_without_a_body(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm", start=False)
    assert (await admin.head("/v1/instances/vm")).headers["etag"]
    assert (await admin.head("/v1/events")).status_code == 200


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/instances?limit=0", "invalid"),
        ("/v1/instances?limit=501", "invalid"),
        ("/v1/instances?limit=ten", "invalid"),
        ("/v1/instances?limit=" + "9" * 5000, "invalid"),
        ("/v1/instances?cursor=%00%ff", "invalid"),
        ("/v1/instances?cursor=eyJhIjoxfQ", "invalid"),
        ("/v1/instances?vm_state=flying", "invalid"),
        ("/v1/instances/vm?wait=soon", "invalid"),
        ("/v1/instances/vm?after_generation=-1", "invalid"),
        ("/v1/instances/vm/events?after=99999999999999999999", "invalid"),
        ("/v1/instances/vm/requests?cursor=nonsense", "invalid"),
        ("/v1/instances/vm/console?tail_bytes=999999999999", "invalid"),
        ("/v1/events?after=x", "invalid"),
    ],
)
async def test_a_wrong_query_is_told(admin: httpx.AsyncClient, path: str, name: str) -> None:
    await make(admin, "vm", start=False)
    problem(await admin.get(path), 422, name)


async def test_an_option_of_the_body_is_rejected_in_the_query(admin: httpx.AsyncClient) -> None:
    """Ignored, it would not be a dry run."""
    answer = await admin.post("/v1/host-moves?dry_run=true", json={"dry_run": False})
    assert "Unknown query parameter 'dry_run'" in str(problem(answer, 422, "invalid")["detail"])


@pytest.mark.parametrize("reference", ["%00", "%ff%fe", "..%2f..%2fetc", "a" * 5000, "%F0%9F%92%A3"])
async def test_a_strange_reference_is_only_unknown(admin: httpx.AsyncClient, reference: str) -> None:
    for path in (f"/v1/instances/{reference}", f"/v1/requests/{reference}", f"/v1/volumes/{reference}"):
        assert (await admin.get(path)).status_code == 404
    for path in (f"/v1/images/{reference}", f"/v1/tokens/{reference}"):
        assert (await admin.delete(path)).status_code == 404


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "k" * 256),
        ("Idempotency-Key", "tab\there"),
        ("If-Match", '"many"'),
        ("If-Match", '"' + "9" * 40 + '"'),
    ],
)
async def test_a_wrong_header_is_told_and_nothing_is_asked(admin: httpx.AsyncClient, header: str, value: str) -> None:
    await make(admin, "vm", start=False)
    answer = await admin.post(REQUESTS, json={"operation": "start"}, headers={header: value})
    said = problem(answer, 400, "bad-header")
    assert header in str(said["detail"])
    assert (await admin.get(REQUESTS)).json()["items"] == []


async def test_a_preference_that_makes_no_sense_is_passed_over(admin: httpx.AsyncClient) -> None:
    await make(admin, "vm", start=False)
    for preference in ("wait=-1", "wait=x", "wait"):
        answer = await admin.post(REQUESTS, json={"operation": "lock"}, headers={"Prefer": preference})
        assert "preference-applied" not in answer.headers


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (StoreFull("The disk is full."), 507, "store-full"),
        (Unavailable("There is no QEMU."), 503, "hypervisor"),
        (BrokenInvariant("Two are served."), 500, "internal"),
        (ZeroDivisionError("secret inside"), 500, "internal"),
    ],
)
async def test_the_servers_own_trouble_is_told_without_its_insides(
    admin: httpx.AsyncClient, api: ApiServer, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, name: str
) -> None:
    async def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(api.server.instances, "stuck", fail)
    said = problem(await admin.get("/v1/stuck"), status, name)
    assert "secret inside" not in json.dumps(said)
    if not isinstance(error, InterlockError) or status == 500:
        assert said["occurrence"]


class TestUploads:
    async def test_an_image_arrives_and_can_be_deleted(self, admin: httpx.AsyncClient, api: ApiServer) -> None:
        answer = await admin.post(
            "/v1/images",
            data={"name": "mine", "kind": "disk", "format": "raw"},
            files={"disk": ("d.img", b"\0" * 1024 * 1024)},
        )
        assert answer.status_code == 201, answer.text
        assert (answer.json()["name"], answer.json()["size_bytes"]) == ("mine", 1024 * 1024)
        assert "mine" in {one["name"] for one in (await admin.get("/v1/images")).json()["items"]}
        assert (await admin.delete("/v1/images/mine")).status_code == 204
        self.nothing_left(api)

    @pytest.mark.parametrize(
        ("data", "files", "status", "name"),
        [
            ({"name": "mine", "kind": "disk"}, {"disk": b"\0" * (UPLOAD_BYTES_MAX + 200_000)}, 413, "too-large"),
            ({"name": "mine", "kind": "disk", "cmdline": "x" * 5000}, {"disk": b"\0" * 512}, 422, "invalid"),
            ({"name": "mine", "kind": "disk"}, {"kernel": b"\0" * 512}, 422, "invalid"),
            ({"name": "mine", "kind": "disk"}, {"dsik": b"\0" * 512}, 422, "invalid"),
            ({"name": "../mine", "kind": "disk"}, {"disk": b"\0" * 512}, 422, "invalid"),
            ({"name": "mine", "kind": "floppy"}, {"disk": b"\0" * 512}, 422, "invalid"),
            ({"name": "mine", "kind": "disk", "sha256": "0" * 64}, {"disk": b"\0" * 512}, 422, "invalid"),
            ({"name": "nothing", "kind": "disk"}, {"disk": b"\0" * 512}, 409, "name-taken"),
        ],
    )
    async def test_a_wrong_upload_leaves_nothing(
        self,
        admin: httpx.AsyncClient,
        api: ApiServer,
        data: dict[str, str],
        files: dict[str, bytes],
        status: int,
        name: str,
    ) -> None:
        answer = await admin.post("/v1/images", data=data, files={key: (key, file) for key, file in files.items()})
        problem(answer, status, name)
        self.nothing_left(api)

    @pytest.mark.parametrize(
        ("content", "media_type", "status", "name"),
        [
            (b"{}", "application/json", 415, "media-type"),
            (b"", "multipart/form-data", 400, "not-a-form"),
            (b"nonsense", "multipart/form-data; boundary=b", 400, "not-a-form"),
            (
                b'--b\r\nContent-Disposition: form-data; name="disk"; filename="d"\r\n\r\ncut sh',
                "multipart/form-data; boundary=b",
                400,
                "not-a-form",
            ),
            (b"--b--\r\n", "multipart/form-data; boundary=b", 422, "invalid"),
        ],
    )
    async def test_what_is_no_form_is_told(
        self, admin: httpx.AsyncClient, api: ApiServer, content: bytes, media_type: str, status: int, name: str
    ) -> None:
        answer = await admin.post("/v1/images", content=content, headers={"Content-Type": media_type})
        problem(answer, status, name)
        self.nothing_left(api)

    async def test_an_endless_upload_is_cut_off(self, admin: httpx.AsyncClient, api: ApiServer) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield b'--b\r\nContent-Disposition: form-data; name="disk"; filename="d"\r\n\r\n'
            while sent < 20 * UPLOAD_BYTES_MAX:
                sent += 65536
                yield b"\0" * 65536

        media_type = {"Content-Type": "multipart/form-data; boundary=b"}
        problem(await admin.post("/v1/images", content=endless(), headers=media_type), 413, "too-large")
        assert sent < 2 * UPLOAD_BYTES_MAX
        self.nothing_left(api)

    async def test_what_a_killed_server_had_received_goes_when_the_next_one_begins(self, api: ApiServer) -> None:
        left = api.server.folder / f"{FOLDER_PREFIX}left"
        left.mkdir()
        (left / "disk.raw").write_bytes(b"half")
        api.server.app()
        self.nothing_left(api)

    @staticmethod
    def nothing_left(api: ApiServer) -> None:
        folder = api.server.folder
        assert not list(folder.glob("upload-*"))
        assert not [path for path in (folder / "images").glob("**/*") if path.is_file()]


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 503)])
async def test_what_the_servers_system_refuses_is_a_problem_with_path_and_remedy(
    api: ApiServer, admin: httpx.AsyncClient, number: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number), "/srv/interlock/images/one.new")

    monkeypatch.setattr(api.server.image_files, "build_small", refuse)
    answer = await admin.post("/v1/images/small", json={"name": "one"})
    said = problem(answer, status, "no-space" if status == 507 else "system")
    assert os.strerror(number) in str(said["detail"])
    assert "/srv/interlock/images/one.new" in str(said["detail"])
    assert said["remedy"]
