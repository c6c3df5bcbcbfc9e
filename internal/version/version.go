// Package version says which vmshim this is.
package version

// Version is set by the Makefile (git describe).
var Version = "unknown"
