"""The model-archiver command: packs, inspects, verifies and signs model archives."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from mms.program import Program

# Whether it is there is for whoever reads it to find out: a file that is missing is no wrong command line.
_PATH = click.Path(path_type=Path)


@click.group(
    "model-archiver",
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--model-name", metavar="NAME", help="Name of the model and of the archive.")
@click.option("-v", "--version", metavar="VERSION", default="1.0", show_default=True, help="Version of the model.")
@click.option(
    "--handler",
    metavar="HANDLER",
    help="handler.py[:Name] (the file is copied in), module:name (in --model-path), or a built-in handler's name.",
)
@click.option("--model-path", type=_PATH, help="Bundle this whole folder, as Multi Model Server does.")
@click.option("--serialized-file", type=_PATH, help="The weights.")
@click.option("--model-file", type=_PATH, help="Python file with the model's class.")
@click.option(
    "--extra-files",
    metavar="A,B,...",
    default="",
    help="More files, folders or globs. A folder keeps its name and its tree (TorchServe's archiver flattens it).",
)
@click.option("-r", "--requirements-file", type=_PATH, help="pip requirements of the handler.")
@click.option(
    "--config-file", type=_PATH, help="model-config.yaml: batch_size, workers, ... and the handler's own keys."
)
@click.option("--export-path", type=_PATH, default=".", help="Folder to write to.")
@click.option(
    "--archive-format",
    type=click.Choice(["default", "zip-store", "tgz", "no-archive"]),
    default="default",
    show_default=True,
    help="default: NAME.mar; zip-store: the same, not compressed; tgz: NAME.tar.gz; no-archive: a folder NAME.",
)
@click.option("--runtime", type=click.Choice(["python", "python3"]), default="python", show_default=True)
@click.option("-f", "--force", is_flag=True, help="Replace an archive that is there.")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Pack a model and its handler into an archive that MMS serves.

    \b
    model-archiver --model-name cat --handler handler.py:Classifier --serialized-file model.pt2 --export-path store
    model-archiver --model-name cat --handler service:handle --model-path folder
    model-archiver inspect cat.mar
    model-archiver verify cat.mar
    model-archiver sign cat.mar --key me.key
    """
    given = [name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if context.invoked_subcommand is not None:
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} does not go with {context.invoked_subcommand}")
        return
    if not given:
        click.echo(context.get_help())
        context.exit(2)
    for name in ("model_name", "handler"):
        if not options[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} is needed")
    _pack(**options)


def _pack(*, export_path: Path, archive_format: str, force: bool, **options: Any) -> None:
    from mms.archive import MODEL_NAME, VERSION, archive_name, write_archive
    from mms_archiver.collect import Recipe, collect
    from mms_archiver.progress import show_progress

    for name, pattern, signs in (
        ("model_name", MODEL_NAME, "'.', '_', '-'"),
        ("version", VERSION, "'.', '_', '-', '+'"),
    ):
        if not pattern.fullmatch(options[name]):
            raise click.UsageError(
                f"--{name.replace('_', '-')} {options[name]!r}: 1 to 128 letters, digits and {signs}, "
                "a letter or digit first"
            )
    target = export_path / archive_name(options["model_name"], archive_format)
    manifest, files = collect(Recipe(**options))
    export_path.mkdir(parents=True, exist_ok=True)
    with show_progress(target.name, sum(source.stat().st_size for source in files.values())) as progress:
        write_archive(target, manifest, files, format=archive_format, progress=progress, force=force)
    click.echo(f"{target}: {manifest.model_name} {manifest.version}, handler {manifest.handler}, files: {len(files)}")


@cli.command()
@click.argument("archive", type=_PATH)
@click.option("--json", "json_", is_flag=True, help="One JSON document instead of tables.")
def inspect(archive: Path, json_: bool) -> None:
    """Show the manifest and the files of ARCHIVE."""
    from mms.archive import ModelArchive
    from mms_archiver import report

    opened = ModelArchive.open(archive)
    if json_:
        click.echo(report.as_json(opened))
    else:
        report.print_tables(opened)


@cli.command()
@click.argument("archive", type=_PATH)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60, show_default=True, help="Seconds for the import."
)
@click.option("--trusted-keys", type=_PATH, help="Public keys (PEM), one of which must have signed ARCHIVE.")
def verify(archive: Path, timeout: float, trusted_keys: Path | None) -> None:
    """Check structure, hashes and signature of ARCHIVE, then import its handler. This runs code of the archive."""
    from mms.signature import TrustedKeys, signers
    from mms_archiver.verify import verify_archive

    found = verify_archive(archive, timeout=timeout, keys=TrustedKeys(trusted_keys) if trusted_keys else None)
    facts = [f"files: {len(found.files)}", "hashes match" if found.manifest.hashed else "it has no hashes"]
    if found.signed_by:
        facts.append(f"signed by {found.signed_by[:16]}")
    elif named := signers(found):
        facts.append(f"its signature names {named[0][:16]}, which --trusted-keys would check")
    click.echo(f"{archive}: sound ({', '.join(facts)}, {found.manifest.handler} imports)")


@cli.command()
@click.argument("name", type=click.Path(path_type=Path))
def keygen(name: Path) -> None:
    """Make a pair of ed25519 keys: NAME.key, which signs and is kept secret, and NAME.pub, which servers trust."""
    from mms.signature import make_keys

    private, public = name.with_name(f"{name.name}.key"), name.with_name(f"{name.name}.pub")
    key_id = make_keys(private, public)
    click.echo(f"{private} signs, {public} is for --trusted-keys; key {key_id[:16]}")


@cli.command()
@click.argument("archive", type=_PATH)
@click.option("--key", type=_PATH, required=True, help="The private key (PEM, ed25519, mode 0600).")
def sign(archive: Path, key: Path) -> None:
    """Sign ARCHIVE: verify its files and pack them again with a signature, in the place of any there was."""
    from mms.signature import SigningKey
    from mms_archiver.sign import sign_archive

    signing = SigningKey(key)
    found = sign_archive(archive, signing)
    click.echo(f"{archive}: {found.manifest.model_name} {found.manifest.version}, signed by {signing.id[:16]}")


def main() -> None:
    """Entry of the command; a termination signal cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
