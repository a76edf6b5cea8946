"""HTML and SVG by the Jinja templates of the folder html/."""

import functools
from typing import TYPE_CHECKING, Any

from dpreg.terminal import printable

if TYPE_CHECKING:
    import jinja2


def render(template: str, **values: Any) -> str:
    """Fills in a template; other templates insert the result as it is.

    Texts among the values are made `printable`, since XML admits no control characters and UTF-8 no unpaired
    surrogates, and escaped.

    Args:
      template: the name of a file in html/.
      values: the values of its variables, by name.
    """
    import markupsafe

    return markupsafe.Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2  # here: most processes write no page

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpreg.outputs", "html"),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["shown"] = shown
    return environment


def shown(value: Any) -> str:
    """A value of a summary, for people."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
        case dict():
            return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
        case list():
            return ", ".join(map(shown, value))
        case _:
            return str(value)
