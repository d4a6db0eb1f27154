"""A sweep as one page for a browser: a file that needs no server and loads nothing from elsewhere."""

from hap_hf.page.page import page_of, write_page

__all__ = ["page_of", "write_page"]
