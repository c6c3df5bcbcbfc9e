package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
	"time"
)

// A result is one number, and what it is measured against.
type result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Against names the result that Ratio is of; empty: none.
	Against string  `json:"against,omitempty"`
	Ratio   float64 `json:"ratio,omitempty"`
	// AtMost and AtLeast are limits for the ratio, or for the value where there
	// is none. Zero: no limit.
	AtMost  float64 `json:"at_most,omitempty"`
	AtLeast float64 `json:"at_least,omitempty"`
	// None says that the value has to be zero.
	None bool `json:"none,omitempty"`
}

func (r result) limited() float64 {
	if r.Against != "" {
		return r.Ratio
	}
	return r.Value
}

func (r result) ok() bool {
	return !(r.None && r.Value != 0 || r.AtMost != 0 && r.limited() > r.AtMost || r.AtLeast != 0 && r.limited() < r.AtLeast)
}

func (r result) limit() string {
	switch {
	case r.None:
		return "0"
	case r.AtMost != 0:
		return fmt.Sprintf("≤ %g", r.AtMost)
	case r.AtLeast != 0:
		return fmt.Sprintf("≥ %g", r.AtLeast)
	}
	return ""
}

type results struct {
	Host    map[string]string `json:"host"`
	Results []result          `json:"results"`
	// TimeLine is the median start's.
	TimeLine []step `json:"time_line,omitempty"`
}

func (rs *results) add(r result) {
	if r.Against != "" {
		i := slices.IndexFunc(rs.Results, func(o result) bool { return o.Name == r.Against })
		r.Ratio = r.Value / rs.Results[i].Value
	}
	rs.Results = append(rs.Results, r)
	// A run that is cut short has said what it knew.
	fmt.Fprintf(os.Stderr, "  %s: %.4g %s\n", r.Name, r.Value, r.Unit)
}

func (rs *results) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s, %s\n\n", rs.Host["machine"], rs.Host["accelerator"], rs.Host["containerd"])
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tVALUE\tRATIO\tOF\tLIMIT\t")
	for _, r := range rs.Results {
		ratio, verdict := "", ""
		if r.Against != "" {
			ratio = fmt.Sprintf("%.2f", r.Ratio)
		}
		if !r.ok() {
			verdict = "MISSED"
		}
		fmt.Fprintf(t, "%s\t%.4g %s\t%s\t%s\t%s\t%s\n", r.Name, r.Value, r.Unit, ratio, r.Against, r.limit(), verdict)
	}
	_ = t.Flush()
	draw(w, rs.TimeLine)
}

// verdict is an error that names every limit that was missed.
func (rs *results) verdict() error {
	var errs []error
	for _, r := range rs.Results {
		if !r.ok() {
			errs = append(errs, fmt.Errorf("%s: %.4g, limit %s", r.Name, r.limited(), r.limit()))
		}
	}
	return errors.Join(errs...)
}

// median of times, in milliseconds.
func median(times []time.Duration) float64 {
	slices.Sort(times)
	return float64(times[len(times)/2].Microseconds()) / 1000
}
