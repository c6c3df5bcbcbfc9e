package cli

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
)

// print writes v as JSON when that was asked for, otherwise a table of which
// the first row is the heading.
func (c *call) print(v any, rows [][]string) error {
	if c.json {
		enc := json.NewEncoder(c.stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			fmt.Fprint(w, cell)
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}
