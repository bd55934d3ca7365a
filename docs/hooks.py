"""Hooks of the documentation site: pages made from files outside docs/, and the package under its import name for the API reference."""

import logging
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "models", "integrations", "tasks", "scripts")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
LOADED = re.compile(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*>')

log = logging.getLogger("mkdocs.hooks.site")


def on_startup(**kwargs: object) -> None:
    """Copy the folders into one package `carafepp`, which mkdocstrings reads without importing it."""
    # mkdocstrings names a file by its path below a folder of this name
    package = ROOT / "build" / "site-packages" / "carafepp"
    shutil.rmtree(package, ignore_errors=True)
    for source, copy in ((ROOT / "carafepp", package), *((ROOT / name, package / name) for name in PACKAGES)):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that lie at the top of the repository, and a page for each repository file that a page links to."""
    for path, uri in PAGES.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    linked = {path for file in files.documentation_pages() for path in repository_links(file.content_string, file.src_uri).values()}
    for path in sorted(path for path in linked if page_uri(path) == source_uri(path)):
        files.append(File.generated(config, source_uri(path), content=source_page(path)))
    for module in undocumented_modules(files):
        log.warning("%s is on no page of docs/api", module)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between repository files at the pages of these files."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # it has no neighbours to list
    uri = page.file.src_uri
    urls = {link: posixpath.relpath(page_uri(path), posixpath.dirname(uri)) for link, path in repository_links(markdown, uri).items()}
    return LINK.sub(lambda match: urls.get(match[0], match[0]), markdown)


def on_page_content(html: str, **kwargs: object) -> str:
    """Keep the source code below a docstring out of the search index."""
    return html.replace('<details class="mkdocstrings-source"', '<details class="mkdocstrings-source" data-search-exclude')


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Refuse a page that loads anything from another host."""
    for tag in LOADED.findall(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, tag)


def repository_links(markdown: str, uri: str) -> dict[str, str]:
    """List the links of the page `uri` to files and folders that exist, each with its path in the repository."""
    origin = next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")
    paths = {link: posixpath.normpath(posixpath.join(posixpath.dirname(origin), link)) for link in LINK.findall(markdown)}
    return {link: path for link, path in paths.items() if not path.startswith("..") and (ROOT / path).exists()}


def page_uri(path: str) -> str:
    """Name the page (or the image) of the site that shows a repository file."""
    if path in PAGES:
        return PAGES[path]
    in_docs = path.startswith("docs/") and (ROOT / path).suffix in (".md", ".png", ".jpg", ".svg")
    return path.removeprefix("docs/") if in_docs else source_uri(path)


def source_uri(path: str) -> str:
    """Name the page that shows a repository file as code."""
    return f"source/{path}.md"


def source_page(path: str) -> str:
    """Show a repository file as highlighted code, or a folder as the list of its files."""
    if (ROOT / path).is_dir():
        language, text = "text", "\n".join(sorted(str(file.relative_to(ROOT)) for file in (ROOT / path).rglob("*") if file.is_file()))
    else:
        lexer = find_lexer_class_for_filename(path)
        language, text = lexer.aliases[0] if lexer else "text", (ROOT / path).read_text()
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~{language}\n{text}\n~~~~\n"


def undocumented_modules(files: Files) -> Iterator[str]:
    """Yield the modules that no page of the API reference shows."""
    pages = [file.content_string for file in files.documentation_pages() if file.src_uri.startswith("api/")]
    shown = set(re.findall(r"^::: (\S+)", "\n".join(pages), re.MULTILINE))
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            module = "carafepp." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
            if file.name != "__init__.py" and not any(f"{name}.".startswith(f"{module}.") for name in shown):
                yield module
