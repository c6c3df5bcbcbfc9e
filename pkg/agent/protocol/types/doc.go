// Package types holds the network objects of the agent protocol.
package types
