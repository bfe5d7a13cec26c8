"""Lists whole directories from the emulator with Google's client and compares them with the files.

Called by google_client.sh with the emulator's program and the directory files.
"""

import contextlib
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile

from google.auth.exceptions import RefreshError
from google.oauth2 import service_account
from googleapiclient.discovery import build
from googleapiclient.errors import HttpError

SCOPES = [
    "https://www.googleapis.com/auth/admin.directory.user.readonly",
    "https://www.googleapis.com/auth/admin.directory.group.readonly",
]


class Checks:
    """Counts what held and says what did not."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def that(self, holds, what):
        if holds:
            self.passed += 1
            print(f"ok      {what}")
        else:
            self.failed += 1
            print(f"FAILED  {what}")

    def raises(self, kind, call, test, what):
        try:
            answer = call()
        except kind as error:
            self.that(test(error), f"{what}: {error}")
        else:
            self.that(False, f"{what}: no error, but {answer!r}")


@contextlib.contextmanager
def emulator(program, directory_file, *arguments):
    """A running emulator: its URL and the path of its key file."""
    with tempfile.TemporaryDirectory() as folder:
        key_file = os.path.join(folder, "key.json")
        process = subprocess.Popen(
            [program, directory_file, "--key-file", key_file, *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stdout.readline()
            prefix = "listening on "
            if not line.startswith(prefix):
                raise RuntimeError(f"the emulator did not start: {line!r}")
            yield line.removeprefix(prefix).strip(), key_file
        finally:
            process.terminate()
            try:
                status = process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        if status != 0:
            raise RuntimeError(f"the emulator ended with status {status}")


def sign_in(url, key_file, subject, scopes=SCOPES):
    credentials = service_account.Credentials.from_service_account_file(key_file).with_scopes(scopes)
    if subject is not None:
        credentials = credentials.with_subject(subject)
    return build(
        "admin",
        "directory_v1",
        credentials=credentials,
        static_discovery=True,
        client_options={"api_endpoint": url},
        cache_discovery=False,
    )


def pages(resource, request, key):
    """All objects of a listing, and how many pages they came on."""
    objects, count = [], 0
    while request is not None:
        page = request.execute()
        count += 1
        objects += page.get(key, [])
        request = resource.list_next(request, page)
    return objects, count


def same(served, expected):
    """Every object with every field, in any order. Only an etag may be served that the file has not."""

    def comparable(objects, reference):
        with_etag = {o["id"] for o in reference if "etag" in o}
        return sorted(
            json.dumps({k: v for k, v in o.items() if k != "etag" or o["id"] in with_etag}, sort_keys=True)
            for o in objects
        )

    return comparable(served, expected) == comparable(expected, expected) and all(o.get("etag") for o in served)


def page_count(objects, page_size):
    return max(1, -(-len(objects) // page_size))


def whole_directory(checks, program, path):
    name = os.path.basename(path)
    with gzip.open(path) as file:
        expected = json.load(file)
    subject = "admin@" + expected["users"][0]["primaryEmail"].split("@")[1]
    with emulator(program, path) as (url, key_file):
        api = sign_in(url, key_file, subject)

        listed, count = pages(api.users(), api.users().list(customer="my_customer", maxResults=500), "users")
        checks.that(same(listed, expected["users"]), f"{name}: {len(listed)} users are those of the file")
        checks.that(count == page_count(expected["users"], 500), f"{name}: users on {count} pages of 500")
        listed, count = pages(api.users(), api.users().list(customer=expected["customerId"]), "users")
        checks.that(same(listed, expected["users"]), f"{name}: the same users by customer id")
        checks.that(count == page_count(expected["users"], 100), f"{name}: users on {count} pages of 100")

        listed, count = pages(api.groups(), api.groups().list(customer="my_customer"), "groups")
        checks.that(same(listed, expected["groups"]), f"{name}: {len(listed)} groups are those of the file")
        checks.that(count == page_count(expected["groups"], 200), f"{name}: groups on {count} pages of 200")

        members, wrong = 0, []
        for group in expected["groups"]:
            direct = expected["members"][group["id"]]
            listed, count = pages(api.members(), api.members().list(groupKey=group["id"]), "members")
            members += len(listed)
            if not same(listed, direct) or count != page_count(direct, 200):
                wrong.append(group["email"])
        checks.that(not wrong, f"{name}: {members} members are those of the file {wrong}")

        biggest = max(expected["groups"], key=lambda group: len(expected["members"][group["id"]]))
        direct = expected["members"][biggest["id"]]
        request = api.members().list(groupKey=biggest["email"].upper(), maxResults=7)
        listed, count = pages(api.members(), request, "members")
        checks.that(
            same(listed, direct) and count == page_count(direct, 7),
            f"{name}: {len(listed)} members by address on {count} pages of 7",
        )

        for domain in sorted({user["primaryEmail"].split("@")[1] for user in expected["users"]}):
            wanted = [user for user in expected["users"] if user["primaryEmail"].endswith("@" + domain)]
            listed, _ = pages(api.users(), api.users().list(domain=domain), "users")
            checks.that(same(listed, wanted), f"{name}: {len(listed)} users of {domain}")


def partial_answers(checks, program, path):
    with gzip.open(path) as file:
        expected = json.load(file)
    subject = "root@elsewhere.example"
    with emulator(program, path, "--subject", subject) as (url, key_file):
        checks.that(stat.S_IMODE(os.stat(key_file).st_mode) == 0o600, "the key file is readable by its owner only")
        api = sign_in(url, key_file, subject)
        request = api.users().list(
            customer="my_customer", maxResults=500, fields="nextPageToken,users(id,name/givenName)"
        )
        listed, _ = pages(api.users(), request, "users")
        wanted = [
            {"id": user["id"], "name": {"givenName": user["name"]["givenName"]}} for user in expected["users"]
        ]
        by_id = lambda user: user["id"]
        checks.that(sorted(listed, key=by_id) == sorted(wanted, key=by_id), "fields selects from every page")

        user, group = expected["users"][0], expected["groups"][0]
        member = expected["members"][group["id"]][0]
        one = api.users().get(userKey=user["primaryEmail"]).execute()
        checks.that(same([one], [user]), "users.get by address")
        one = api.groups().get(groupKey=group["id"]).execute()
        checks.that(same([one], [group]), "groups.get by id")
        one = api.members().get(groupKey=group["email"], memberKey=member["email"]).execute()
        checks.that(same([one], [member]), "members.get by addresses")
        one = api.members().hasMember(groupKey=group["id"], memberKey=member["id"]).execute()
        checks.that(one == {"isMember": True}, "members.hasMember of a member")
        listed, _ = pages(api.groups(), api.groups().list(userKey=user["primaryEmail"]), "groups")
        wanted = [
            group
            for group in expected["groups"]
            if any(member["id"] == user["id"] for member in expected["members"][group["id"]])
        ]
        checks.that(same(listed, wanted), f"groups.list of one user: {len(listed)}")
        listed, _ = pages(api.users(), api.users().list(customer="my_customer", orderBy="email"), "users")
        emails = [user["primaryEmail"] for user in listed]
        checks.that(len(emails) > 500 and emails == sorted(emails), "users are listed by address over all pages")


def refusals(checks, program, path):
    with gzip.open(path) as file:
        expected = json.load(file)
    user = expected["users"][0]["primaryEmail"]
    subject = "admin@" + user.split("@")[1]

    def is_error(status, reason):
        return lambda error: error.resp.status == status and error.error_details[0]["reason"] == reason

    def refused(error, description):
        return isinstance(error.args[1], dict) and error.args[1] == description

    with emulator(program, path) as (url, key_file):
        api = sign_in(url, key_file, subject)
        for call, status, reason, what in [
            (api.members().list(groupKey="nobody@example.com"), 404, "notFound", "members of an unknown group"),
            (api.groups().get(groupKey="a/b%c"), 404, "notFound", "an unknown group with a slash"),
            (api.users().get(userKey="nobody@example.com"), 404, "notFound", "an unknown user"),
            (api.users().list(domain="nowhere.example"), 404, "notFound", "an unknown domain"),
            (api.users().list(customer="C0other"), 400, "badRequest", "another customer"),
            (api.users().list(), 400, "badRequest", "neither customer nor domain"),
            (api.groups().list(customer="my_customer", pageToken="x"), 400, "invalid", "a wrong page token"),
            (api.groups().list(customer="my_customer", fields="groups(mail)"), 400, "invalidParameter", "a wrong field"),
        ]:
            checks.raises(HttpError, call.execute, is_error(status, reason), what)

        stranger = sign_in(url, key_file, "nobody@nowhere.example").users().list(customer="my_customer")
        invalid = {"error": "invalid_grant", "error_description": "Invalid email or User ID"}
        checks.raises(RefreshError, stranger.execute, lambda error: refused(error, invalid), "an unknown subject")

        drive = sign_in(url, key_file, subject, ["https://www.googleapis.com/auth/drive"]).users()
        checks.raises(
            RefreshError,
            drive.list(customer="my_customer").execute,
            lambda error: error.args[1]["error"] == "unauthorized_client",
            "a scope that was not delegated",
        )
        users_only = sign_in(url, key_file, subject, SCOPES[:1])
        checks.raises(
            HttpError,
            users_only.groups().list(customer="my_customer").execute,
            lambda error: error.resp.status == 403 and "insufficient authentication scopes" in str(error),
            "a call outside of the scopes",
        )
        for who, what in [(user, "a subject that is no administrator"), (None, "no subject")]:
            request = sign_in(url, key_file, who).users().list(customer="my_customer")
            checks.raises(HttpError, request.execute, is_error(403, "forbidden"), what)


def main():
    # So that the emulator is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    program, *files = sys.argv[1:]
    checks = Checks()
    checks.that(len(files) == 3, f"there are three directory files: {len(files)}")
    for path in files:
        whole_directory(checks, program, path)
    partial_answers(checks, program, files[0])
    refusals(checks, program, files[0])
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
