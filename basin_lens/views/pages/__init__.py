"""Pages: Python chooses what is said, the templates beside it how it is laid out; `page.py` joins the two."""
