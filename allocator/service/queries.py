"""Parameters that several routes take."""

from typing import Annotated

from fastapi import Query

from allocator.service.paging import LARGEST_PAGE

Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="Most items of the page.")]
Cursor = Annotated[str | None, Query(max_length=300, description="The last page's next_cursor.")]
Identifier = Annotated[str | None, Query(pattern=r"^[0-9a-f-]{1,80}$")]
