//go:build !amd64

package main

func clockParams() []string { return nil }
