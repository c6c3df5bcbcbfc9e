// Package arch holds the layout test: import arrows and package comments.
package arch
