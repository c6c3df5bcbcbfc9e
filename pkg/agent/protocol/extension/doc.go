// Package extension is what this project adds to the agent protocol: a ttrpc
// service, the names that announce it, and the framing of byte streams.
package extension
