"""How TensorStore reaches each kind of remote storage: through which server, in which region, with whose credentials.

All of that comes from the standard places, when a store is opened: environment variables, the files of the AWS command
line, Application Default Credentials of Google. Nothing of it is written anywhere, and a store cannot name any of it.
"""

import configparser
import dataclasses
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from actstore.errors import CredentialsError, InputError
from actstore.kvstore.addresses import Address, shown

_SERVER = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])(?::([0-9]{1,5}))?(?:/[^\s?#@\\]*)?")
_KEYS = {"aws_access_key_id", "role_arn", "credential_process"}


def spec_of(address: Address, environ: MutableMapping[str, str]) -> dict[str, Any]:
    """TensorStore's spec of a place, without the path below the bucket.

    Raises:
        InputError: files of the AWS command line that cannot be read, or an address of a server that is none.
        CredentialsError: `GOOGLE_APPLICATION_CREDENTIALS` names no file.
    """
    match address.scheme:
        case "s3":
            return {"driver": "s3", "bucket": address.bucket, **s3_settings(environ)}
        case "gs":
            use_emulator(environ)
            _check_google_file(environ)
            return {"driver": "gcs", "bucket": address.bucket}
        case "memory":
            return {"driver": "memory"}
        case _:
            return {"driver": "http", "base_url": f"{address.scheme}://{address.bucket}/"}


def use_emulator(environ: MutableMapping[str, str]) -> None:
    """Google's own libraries know a test server as STORAGE_EMULATOR_HOST, TensorStore by a variable of its own."""
    host = environ.get("STORAGE_EMULATOR_HOST")
    if host:
        address = _server("STORAGE_EMULATOR_HOST", host if "://" in host else f"http://{host}")
        environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)


def _check_google_file(environ: Mapping[str, str]) -> None:
    """Refuses what is no file before the library that reads it, which ends the process at a folder."""
    path = environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if not path or (os.access(path, os.R_OK) and not Path(path).is_dir()):
        return
    found = "a folder" if Path(path).is_dir() else "no file that can be read"
    raise CredentialsError(
        f"GOOGLE_APPLICATION_CREDENTIALS is {path!r}, which is {found}; expected a file with the key of a service "
        "account: name one, or unset it"
    )


def _server(name: str, text: str) -> str:
    """The address of a server, as some setting gives it.

    Raises:
        InputError: it is none.
    """
    found = _SERVER.fullmatch(text)
    if found is None or int(found[1] or 0) > 65535:
        raise InputError(
            f"{name} is {shown(text)}; expected the address of a server, such as https://host.example:9000, without "
            "a user, a space or a query: correct it, or unset it"
        )
    return text.rstrip("/")


def s3_settings(environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Server, region and kind of credentials, in the order in which the AWS command line looks for them.

    Without a server it is that of AWS, and TensorStore asks for the region of the bucket.

    Raises:
        InputError: files that cannot be read, no such profile, or an address of a server that is none.
    """
    profile = Profile.of(environ)
    found: dict[str, Any] = {"aws_credentials": _credentials(profile, environ)}
    endpoints = {
        **{name: environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")},
        f"endpoint_url of the profile {profile.name!r}": profile.endpoint,
    }
    named = next(((name, endpoint) for name, endpoint in endpoints.items() if endpoint), None)
    if named and environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        found["endpoint"] = _server(*named)
        region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or profile.region
        if region:
            found["aws_region"] = region
    return found


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the files of the AWS command line say of one profile, and which files these are."""

    name: str
    files: dict[str, str]
    region: str | None
    endpoint: str | None
    has_keys: bool

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Profile":
        """The profile that the environment names, or `default`.

        Raises:
            InputError: a file cannot be read, or there is no such profile.
        """
        name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE") or "default"
        paths = {
            "config_file": environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
            "credentials_file": environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        }
        config, keys = (_parsed(path) for path in paths.values())
        section = "default" if name == "default" else f"profile {name}"
        if name != "default" and section not in config and name not in keys:
            raise InputError(
                f"AWS_PROFILE names the profile {name!r}, which is in none of the files of the AWS command line; "
                "name one that is, or unset it"
            )
        settings = config.get(section, {})
        nested = config.get(f"services {settings.get('services', '')}", {}).get("s3", "")
        services = dict(line.split("=", 1) for line in nested.replace(" ", "").splitlines() if "=" in line)
        return cls(
            name,
            {kind: str(Path(path).expanduser().absolute()) if content else os.devnull
             for (kind, path), content in zip(paths.items(), (config, keys), strict=True)},
            settings.get("region"),
            services.get("endpoint_url") or settings.get("endpoint_url"),
            not _KEYS.isdisjoint([*settings, *keys.get(name, {})]),
        )  # fmt: skip


def _parsed(path: str) -> dict[str, dict[str, str]]:
    """The sections of a file; none where there is no file."""
    parser = configparser.RawConfigParser(default_section="", strict=False)
    try:
        parser.read_string(Path(path).expanduser().read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error, RuntimeError) as error:  # RuntimeError: of a ~user
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); expected a file of the AWS command line: mend it, or "
            "name another with AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE"
        ) from None
    return {section: dict(parser[section]) for section in parser.sections()}


def _credentials(profile: Profile, environ: Mapping[str, str]) -> dict[str, Any]:
    """Where TensorStore takes keys from. Told exactly, because its own search passes over profiles in silence.

    Keys of the environment come before a profile that it names, as they do for boto3 and the AWS command line; empty
    variables are none. The last resort is the metadata service of EC2; where that is switched off, requests are not
    signed: public buckets.
    """
    if environ.get("AWS_ACCESS_KEY_ID") and environ.get("AWS_SECRET_ACCESS_KEY"):
        return {"type": "environment"}
    if profile.has_keys:
        return {"type": "profile", "profile": profile.name, **profile.files}
    if "AWS_WEB_IDENTITY_TOKEN_FILE" in environ:
        return {"type": "default"}
    if any(name.startswith("AWS_CONTAINER_CREDENTIALS_") for name in environ):
        return {"type": "ecs"}
    return {"type": "anonymous" if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true" else "imds"}
