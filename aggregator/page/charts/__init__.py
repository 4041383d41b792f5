"""Charts as SVG, made here so that the page needs no library in the browser.

Every chart has the same columns, one a round, so that charts below each other can be compared. Only
heights are pixels: widths are shares of the page's, which makes one chart serve desk and phone.
Colours are classes of page.css, so that one chart serves light and dark.
"""
